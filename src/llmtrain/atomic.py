"""Files and links that are replaced as a whole, also on file systems that lack what that takes.

    with replacing(path) as file: ...    a file, on disk before it takes the place of the old one
    point(name, target)                  a link

A mounted object store may have no links, no renames and no fsync of folders. Then a name that points to a folder is a
small file that holds the target, and a file is replaced by writing it anew.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

LACKING = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL})
"""Error numbers of an operation that a file system lacks. EPERM may have other causes, but the fallback fails
too then."""

_MAX_POINTER_BYTES = 4096
_POINTER = re.compile(rb"/?([^\0\n/]{1,255}/)*[^\0\n/]{1,255}\n")
"""A line that is a path."""


def sync(path: Path) -> None:
    """Return when the file, or the folder's list of names, is on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if hasattr(fcntl, "F_FULLFSYNC"):  # macOS: fsync alone leaves the data in the drive's cache
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
        else:
            os.fsync(descriptor)
    except OSError as error:
        if error.errno not in LACKING or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def replace(temporary: Path, path: Path) -> None:
    """Give a file or a link another's place: in one step where there are renames, else by writing it anew."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        if path.is_symlink():
            path.unlink()
        if temporary.is_symlink():
            path.unlink(missing_ok=True)
            path.symlink_to(os.readlink(temporary))
        else:
            path.write_bytes(temporary.read_bytes())
        temporary.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Open a file that takes the place of `path` at the end of the block, when it is on the disk. Raises OSError.

    If the block fails, or the process is killed, `path` stays as it was.
    """
    if path.is_dir():  # "." has no name that another could stand beside
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:  # a full disk: the system does not say of which file
            error.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace `path` by a file of `text` in UTF-8, as `replacing` does. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by `document`, as `replacing` does. Raises ValueError at NaN or infinity, and OSError."""
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, as hexadecimal digits. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Add lines at the end of a file, which is made if need be. Raises OSError.

    A torn line that a kill or a full disk left at its end is ended first: what follows would be lost with it.
    """
    with path.open("ab+") as file:
        torn = b""
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + "".join(f"{line}\n" for line in lines).encode())


def point(name: Path, target: str, *, temporary: Path | None = None) -> None:
    """Let `name` point to `target`, a path relative to its folder; what it was before is replaced.

    `temporary`: a name beside it for the work; None: a hidden one of this process.
    """
    temporary = temporary or name.with_name(f".{name.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        temporary.write_text(target + "\n", encoding="utf-8")
    replace(temporary, name)


def is_pointer(name: Path) -> bool:
    """Return whether `point` may have made this: a link, or a file of one short line."""
    if name.is_symlink():
        return True
    if not name.is_file() or name.stat().st_size >= _MAX_POINTER_BYTES:
        return False
    return _POINTER.fullmatch(name.read_bytes()) is not None  # else a small file of somebody else's


def follow(name: Path) -> Path:
    """Return what `name` points to, one step on; `name` itself if it is no pointer."""
    if name.is_symlink():
        return name.parent / os.readlink(name)
    if is_pointer(name):
        return name.parent / name.read_bytes().decode("utf-8", errors="replace").strip()
    return name
