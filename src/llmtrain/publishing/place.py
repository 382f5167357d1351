"""Makes a folder completely or not at all: it is filled and checked beside its destination, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from llmtrain.atomic import sync
from llmtrain.errors import ConfigError, RunError

EXPORT_FILE = "export.json"
"""File that describes a result's source, and how far the result differs from it."""
PUBLISH_FILE = "publish.json"
MADE_HERE = (EXPORT_FILE, PUBLISH_FILE)


def check_free(destination: Path, *, force: bool) -> None:
    """Raise ConfigError if `destination` exists, unless `force` is given and it was made by llmtrain."""
    if not os.path.lexists(destination):
        parent = next(folder for folder in destination.absolute().parents if folder.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            raise ConfigError(f"{destination}: nothing can be written in {parent}; name another folder with --to")
        return
    if not destination.is_dir():
        raise ConfigError(f"{destination} exists and is not a folder; name another one with --to")
    if not any(destination.iterdir()):
        return
    if not force:
        raise ConfigError(f"{destination} is there already; name another folder with --to, or replace it: --force")
    if not any((destination / name).is_file() for name in MADE_HERE):
        raise ConfigError(
            f"{destination} was not made by llmtrain (it has no {' or '.join(MADE_HERE)}), so --force does not replace "
            "it; remove it yourself, or name another folder with --to"
        )


@contextmanager
def new_folder(destination: Path, *, force: bool) -> Iterator[Path]:
    """Yield an empty folder, and move it to `destination` if the block succeeds; otherwise delete it.

    Raises ConfigError as `check_free` does; RunError if the folder cannot be written (a full disk).
    """
    check_free(destination, force=force)
    destination = destination.absolute()
    part = destination.with_name(f".{destination.name}.part-{os.getpid()}")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        yield part
        _sync_all(part)
        _move(part, destination, force=force)
    except OSError as error:
        raise RunError(f"{destination} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def passing_folder(name: str) -> Iterator[Path]:
    """Yield an empty folder below artifacts/, which is deleted after the block."""
    folder = Path("artifacts").absolute() / f".{name}.passing-{os.getpid()}"
    try:
        folder.mkdir(parents=True)
        yield folder
    except OSError as error:
        raise RunError(f"{folder} cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(part: Path, destination: Path, *, force: bool) -> None:
    check_free(destination, force=force)  # another process may have made it meanwhile
    replaced = destination.with_name(f".{destination.name}.replaced-{os.getpid()}")
    if destination.is_dir():
        destination.rename(replaced)
    part.rename(destination)
    sync(destination.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync_all(folder: Path) -> None:
    for parent, _, files in os.walk(folder):
        for name in files:
            sync(Path(parent) / name)
        sync(Path(parent))
