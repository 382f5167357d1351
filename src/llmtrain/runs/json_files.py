"""Strict JSON: what is written, and files of a run in which a kill, a full disk or a stranger left anything."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, Final

_DECODER: Final = json.JSONDecoder(parse_constant=lambda _: None)  # NaN is not JSON, but Python reads it


def json_value(value: Any) -> Any:
    """Return `value` as JSON has it: numbers that are not finite are null, data classes objects, paths text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): json_value(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [json_value(item) for item in value]
    if is_dataclass(value) and not isinstance(value, type):
        return json_value(asdict(value))
    return str(value)


def json_object(path: Path, *, problems: list[str]) -> dict[str, Any]:
    """Return the object in a file. If the file holds none, return {} and add a line to `problems`."""
    try:
        document = json.loads(path.read_bytes())
        if isinstance(document, dict):
            return document
        problems.append(f"{path.name} holds no object")
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return {}


def json_lines(content: bytes) -> Iterator[dict[str, Any] | None]:
    """Yield the object of each line; None for a line that holds none. A number that is not finite is None."""
    for text in content.splitlines():
        try:
            line = _DECODER.decode(text.decode())
        except (ValueError, RecursionError):
            line = None
        yield line if isinstance(line, dict) else None


def json_lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a file; none without the file."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    yield from (line for line in json_lines(content) if line is not None)
