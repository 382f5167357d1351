"""Runs the sections, each in a process of its own and within its time, and prints what they measured.

A section that has crashed or was cut loses only what it had not measured yet. Time that one leaves over goes to those
after it. The run has failed if a check has failed, or if a section with checks did not come to its end; how fast
anything is decides nothing.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.document import Document, read_document, write_document

GRACE_SECONDS = 3.0
"""Time that a section that is cut has to end by itself."""
TAIL = 3000
"""Characters of a crashed section's output that the document keeps."""


@dataclass(frozen=True, kw_only=True)
class BenchSection:
    """A part of the benchmark."""

    name: str
    seconds: float
    """Its share of the time."""
    command: Sequence[str]
    has_checks: bool = False


def run_sections(
    sections: Sequence[BenchSection],
    file: Path,
    *,
    seconds: float,
    environment: Mapping[str, str],
    header: Mapping[str, Any] | None = None,
) -> Document:
    """Run the sections one after the other, in `seconds` at most; return the document, which is in `file` too."""
    began = time.monotonic()
    empty = {"state": "not started", "seconds": 0.0, "rows": [], "checks": []}
    document: Document = {**(header or {}), "passed": False, "seconds": 0.0, "machine": {}}
    write_document(file, {**document, "sections": {section.name: empty for section in sections}})
    until = 0.0
    for section in sections:
        until = min(until + section.seconds, seconds)
        limit = until - (time.monotonic() - began)
        _run(section, file, limit=limit, environment=environment)
    document = read_document(file)
    document["seconds"] = round(time.monotonic() - began, 1)
    document["failures"] = failures_of(document, sections)
    document["passed"] = not document["failures"]
    write_document(file, document)
    return document


def failures_of(document: Document, sections: Sequence[BenchSection]) -> list[str]:
    """Return each check that failed, and each section whose checks were not all made."""
    failures = []
    for section in sections:
        found = document["sections"][section.name]
        failures += [f"{section.name}: {check['name']}" for check in found["checks"] if not check.get("passed", True)]
        if section.has_checks and found["state"] != "done":
            failures.append(f"{section.name}: {found['state']}")
    return failures


def _run(section: BenchSection, file: Path, *, limit: float, environment: Mapping[str, str]) -> None:
    """Run one section and write down how it ended."""
    print(f"{section.name}: at most {max(0.0, limit):.0f} s", file=sys.stderr, flush=True)
    if limit <= 0:
        return
    _note(file, section, state="running")
    began = time.monotonic()
    log = file.with_name(f"{file.stem}-{section.name}.log")
    with log.open("wb") as output:
        process = subprocess.Popen(
            section.command, stdout=output, stderr=output, env=dict(environment), start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_session(process)
    ended: dict[str, Any] = {"seconds": round(time.monotonic() - began, 1), "limit": round(limit, 1)}
    if code is None:
        ended["state"] = "cut"
    elif code:
        ended |= {"state": "crashed", "exit_code": code, "output": log.read_text(errors="replace")[-TAIL:]}
    else:
        ended["state"] = "done"
        log.unlink()
    _note(file, section, **ended)


def _note(file: Path, section: BenchSection, **values: Any) -> None:
    document = read_document(file)
    document["sections"][section.name] |= values
    write_document(file, document)


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End a section and all that it started: torchrun's workers are no part of its session."""
    started = _descendants(process.pid)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


def _descendants(pid: int) -> list[int]:
    """Return the processes below `pid`, as Linux lists them; none elsewhere."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for above in found:
        found += [child for child, parent in parents.items() if parent == above]
    return found[1:]


def table_of(document: Document) -> str:
    """Return the document as text: how each section ended, its checks, its rows."""
    lines = [f"{name}: {value}" for name, value in document["machine"].items()]
    for name, section in document["sections"].items():
        lines += ["", f"== {name}: {section['state']}, {section['seconds']:.0f} s"]
        lines += [line for line in section.get("output", "").splitlines()[-5:] if line.strip()]
        for check in section["checks"]:
            mark = "skipped" if "skipped" in check else "ok" if check["passed"] else "FAILED"
            value = check.get("skipped") or check.get("error") or f"{_shown(check['value'])} (limit {check['limit']:g})"
            lines.append(f"{mark:<8} {check['name']:<52} {value}")
        lines += _columns(section["rows"])
    lines += ["", f"{document['seconds']:.0f} s in all; " + ("passed" if document["passed"] else "FAILED:")]
    return "\n".join([*lines, *(f"  {failure}" for failure in document["failures"])])


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the values of rows in columns; lists and maps are in the document alone."""
    names = list(
        dict.fromkeys(name for row in rows for name, value in row.items() if not isinstance(value, list | dict))
    )
    cells = [names, *([_shown(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return "" if value is None or isinstance(value, list | dict) else str(value)[:60]
