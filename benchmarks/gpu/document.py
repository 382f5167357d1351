"""gpu.json: one document for all sections. A section writes it anew after each result, so nothing is lost with it.

    {"passed": …, "machine": {…}, "sections": {NAME: {"state": …, "seconds": …, "rows": [{…}], "checks": [{…}]}}}

A check has a name, a value and the limit up to which it passes; or a reason for which it was skipped, or its error.
"""

from __future__ import annotations

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Document = dict[str, Any]


class Skipped(Exception):
    """Raised by a check or a row that this machine cannot make; its text is the reason."""


def read_document(file: Path) -> Document:
    """Return the document in `file`."""
    document: Document = json.loads(file.read_text(encoding="utf-8"))
    return document


def write_document(file: Path, document: Mapping[str, Any]) -> None:
    """Replace `file` as a whole, so that a process that is killed leaves the document before or the one after."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(temporary, file)


class Recorder:
    """Writes the results of one section."""

    def __init__(self, file: Path, section: str) -> None:
        self._file, self._section = file, section

    def row(self, **values: Any) -> None:
        """Add a row to the section's table."""
        self._add("rows", {name: _json(value) for name, value in values.items()})

    def check(self, name: str, *, value: float, limit: float) -> None:
        """Add a check, which passes if `value` is at most `limit`; a value that is no number fails."""
        self._add("checks", {"name": name, "value": _json(value), "limit": limit, "passed": bool(value <= limit)})

    def checked(self, name: str, make: Callable[[], float], *, limit: float) -> None:
        """Add the check whose value `make` returns. What it raises is a check that failed, or was skipped."""
        try:
            self.check(name, value=make(), limit=limit)
        except Skipped as reason:
            self._add("checks", {"name": name, "value": None, "limit": limit, "skipped": str(reason)})
        except Exception as error:
            traceback.print_exc()
            found = {"value": None, "limit": limit, "passed": False, "error": _told(error)}
            self._add("checks", {"name": name, **found})

    @contextmanager
    def trying(self, **named: Any) -> Iterator[None]:
        """Let the block fail: the row that it would have added then holds `named` and the reason."""
        try:
            yield
        except Skipped as reason:
            self.row(**named, skipped=str(reason))
        except Exception as error:
            traceback.print_exc()
            self.row(**named, error=_told(error))

    def speed(self, section: str, case: str) -> float | None:
        """Return the tokens/s of a row of another section; None where it was not measured."""
        rows = read_document(self._file)["sections"].get(section, {}).get("rows", [])
        found = (row["tokens_per_sec"] for row in rows if row.get("case") == case and "tokens_per_sec" in row)
        return next(found, None)

    def machine(self, **values: Any) -> None:
        """Describe the machine."""
        document = read_document(self._file)
        write_document(self._file, {**document, "machine": values})

    def _add(self, kind: str, entry: Mapping[str, Any]) -> None:
        document = read_document(self._file)
        document["sections"][self._section][kind].append(entry)
        write_document(self._file, document)
        print(entry, file=sys.stderr, flush=True)


def _json(value: Any) -> Any:
    """Return what JSON can hold: a number that is not finite as its name."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:500]}"
