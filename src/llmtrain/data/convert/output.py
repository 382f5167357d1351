"""Write the converted rows: to a new file or folder, whole or not at all, and never in place of what is read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from llmtrain.atomic import replace, sync
from llmtrain.errors import ConfigError
from llmtrain.local_paths import LOCAL, checked_path

SUFFIXES = (".jsonl", ".ndjson")
_BOM = b"\xef\xbb\xbf"


def is_folder(out: str) -> bool:
    """Return whether OUT is a folder, in which each input becomes a file. Raises ConfigError if it is no JSONL file."""
    out = checked_path(out, LOCAL, key="OUT")
    path = Path(out).expanduser()
    if path.is_dir() or out.endswith(("/", os.sep)) or not path.suffix:
        return True
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(f"OUT: {out} should end in .jsonl, or be a folder (end it with /)")
    return False


def check_output(out: str, *, paths: Sequence[str], files: Iterable[str], force: bool) -> Path:
    """Return OUT as a path. Raises ConfigError where it is an input or among them, or is there without `force`."""
    path = Path(os.path.realpath(os.path.expanduser(out)))
    for given in paths:
        folder = Path(os.path.realpath(os.path.expanduser(given)))
        if folder.is_dir() and (path == folder or folder in path.parents):
            raise ConfigError(f"OUT: {out} lies in {given}, which is converted: name a place outside of it")
    for file in files:
        inside = Path(os.path.realpath(file))
        if inside == path or (path.exists() and path.samefile(inside)):
            raise ConfigError(f"OUT: {out} is converted itself: nothing is converted in place, name another file")
        if path in inside.parents:
            raise ConfigError(f"OUT: {out} holds {file}, which is converted: name another folder")
    if path.is_dir():
        others = [entry.name for entry in sorted(path.rglob("*")) if entry.is_file() and entry.suffix not in SUFFIXES]
        if others:
            raise ConfigError(f"OUT: {out} is a folder with other files in it ({others[0]}): name another")
    if path.exists() and not force and not (path.is_dir() and not any(path.iterdir())):
        raise ConfigError(f"OUT: {out} is there already: name another, or replace it with --force")
    return path


@contextmanager
def put_in_place(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to. At the end it takes the place of `path`; on an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if temporary.is_dir():
            _replace_folder(temporary, path)
        else:
            replace(temporary, path)
        sync(path.parent)
    finally:
        _remove(temporary)


def _replace_folder(temporary: Path, path: Path) -> None:
    before = temporary.with_suffix(".before")
    if path.exists():
        path.rename(before)
    try:
        temporary.rename(path)
    except OSError:
        if before.exists():
            before.rename(path)
        raise
    _remove(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_lines(path: Path, sources: Iterable[Iterable[bytes]]) -> None:
    """Write lines of several sources one after the other.

    A single source stands in the file byte for byte. Between sources, what would join two lines or stand inside of the
    text (a missing line end, a byte order mark) is set right.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        line_ended = True
        for lines in sources:
            for line in lines:
                text = line.removeprefix(_BOM) if stream.tell() else line
                stream.write(text if line_ended else b"\n" + text)
                line_ended = text.endswith(b"\n")
        stream.flush()
        os.fsync(stream.fileno())
