"""The disks of runs and of the Hugging Face cache: what they have and lack, and what is in the way of training."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmtrain.distributed.diagnosis import Finding, fatal, warning
from llmtrain.training.checkpoint import probe_folder

LOW_DISK_BYTES = 5_000_000_000
NO_DISK_BYTES = 200_000_000


@dataclass(frozen=True, kw_only=True)
class RunsFolder:
    """The file system of the folder of all runs."""

    path: str
    free_bytes: int
    writable: bool
    lacks: list[str]
    """Features that checkpoints need and the file system lacks: renaming of folders, links, fsync of folders."""


@dataclass(frozen=True, kw_only=True)
class DiskFacts:
    """The file systems that a run writes to."""

    runs: RunsFolder
    cache: str
    """Folder of the Hugging Face cache."""
    cache_free_bytes: int


def look_at_disks(root: Path, *, cache: Path) -> DiskFacts:
    """Ask the file systems of the folder of all runs and of the cache."""
    free_bytes = shutil.disk_usage(_existing(cache)).free
    return DiskFacts(runs=look_at_folder(root), cache=str(cache), cache_free_bytes=free_bytes)


def look_at_folder(root: Path) -> RunsFolder:
    """Try what the file system at `root` can do, or at the next folder above it that is there; leave nothing behind."""
    folder = _existing(root.absolute())
    lacks: list[str] = []
    writable = os.access(folder, os.W_OK)
    if writable:
        try:
            with TemporaryDirectory(prefix=".doctor-", dir=folder) as name:
                lacks = probe_folder(Path(name))
                if not _syncs(Path(name)):
                    lacks.append("fsync of folders")
        except OSError:
            writable = False
    return RunsFolder(
        path=str(root.absolute()), free_bytes=shutil.disk_usage(folder).free, writable=writable, lacks=lacks
    )


def disk_findings(facts: DiskFacts) -> list[Finding]:
    """Return what is in the way on the disks."""
    found, runs = [], facts.runs
    free = f"{_gb(runs.free_bytes)} free at {runs.path}"
    if not runs.writable:
        fix = "give another output.root_dir, or the rights to this one"
        found.append(fatal(f"{runs.path} cannot be written", fix))
    elif runs.free_bytes < NO_DISK_BYTES:
        found.append(fatal(free, "make room: a run could not save; or output.root_dir"))
    elif runs.free_bytes < LOW_DISK_BYTES:
        found.append(warning(free, "make room, lower trainer.keep_last, or give another output.root_dir"))
    if runs.lacks:
        what = f"the file system of {runs.path} lacks {', '.join(runs.lacks)}: checkpoints do without"
        found.append(warning(what, "a local disk as output.root_dir survives a power cut better"))
    if facts.cache_free_bytes < LOW_DISK_BYTES:
        what = f"{_gb(facts.cache_free_bytes)} free at {facts.cache}"
        found.append(warning(what, "make room, or set HF_HOME to another disk"))
    return found


def _syncs(folder: Path) -> bool:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.is_dir())


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
