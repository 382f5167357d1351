"""The checkpoints of one run beside each other: which is newest, which links point where, which may go.

    checkpoints/
      step_000500/  step_001000/  step_001500/
      latest → step_001500    best → step_001000    final → …     links with relative targets
      .temp-… .aside-… .trash-… .link-…                           work of a process; gone when it is done

"Newest" goes by the order of saving, which the manifests number, and not by the step: a run that is resumed from an old
checkpoint goes on from there, and what it saves next is newer than the higher steps that it left behind.

Where folders cannot be renamed (a mounted object store) a checkpoint is written in its place: without its manifest,
which comes last and goes first, it does not count.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable
from pathlib import Path

from llmtrain.files import LACKING, follow, is_pointer, point, sync
from llmtrain.testing.faults import reach
from llmtrain.training.checkpoint_files import MANIFEST, CheckpointError, read_manifest, verify

log = logging.getLogger("llmtrain.checkpoint")

_Look = list[tuple[str, int, int]]
"""Path, size in bytes and time of change in ns of every file of a checkpoint."""

LATEST, BEST, FINAL = "latest", "best", "final"

_STEP_NAME = re.compile(r"step_(\d{6,})")
_WORK_NAME = re.compile(r"\.(temp|aside|trash|link)-(\w+)-(.+)-(\d+)")
_ABANDONED_AFTER_SEC = 3600.0
"""A save touches its folder all the time: what was left alone for so long belongs to a process that is gone."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return checkpoints / f"step_{step:06d}"


def newest_good(checkpoints: Path) -> tuple[Path, list[str]] | None:
    """The newest checkpoint that passes `verify`, and what is wrong with each newer one; None if there are none at all.

    Changes nothing. Raises CheckpointError if checkpoints stand here and none of them is good.
    """
    skipped: list[str] = []
    readable, unreadable = _in_order(checkpoints)
    for folder in readable:
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        newer = [why for other, why in unreadable if _step_of(other) > _step_of(folder)]
        return folder, newer + skipped
    skipped = [why for _, why in unreadable] + skipped
    if skipped:
        raise CheckpointError(f"no checkpoint in {checkpoints} is good:\n  " + "\n  ".join(skipped))
    return None


def work_path(checkpoints: Path, kind: str, name: str) -> Path:
    """A hidden name for work in progress, which says whose it is: kind temp, aside, trash or link."""
    return checkpoints / f".{kind}-{name}-{_host()}-{os.getpid()}"


class Shelf:
    """The `checkpoints` folder of a run, as the one process that writes to it sees it."""

    def __init__(self, checkpoints: Path) -> None:
        self.folder = checkpoints
        self._renames = True
        self._judged: dict[Path, tuple[_Look, bool]] = {}

    def tidy(self) -> None:
        """Undo what a killed process left half done: remove its work, put back what it moved aside, mend the links.

        Before, find out what the file system cannot do, and say so.
        """
        self._renames, lacks = probe_folder(self.folder)
        if lacks:
            how = "named by files, as there are no links" if self._renames else "written in place, the manifest last"
            log.warning(
                "%s is on a file system without %s (an object store's mount?): checkpoints are %s",
                self.folder,
                " and ".join(lacks),
                how,
            )
        for path in sorted(self.folder.iterdir()):
            work = _WORK_NAME.fullmatch(path.name)
            if work is None or not _is_abandoned(path, host=work[3], pid=int(work[4])):
                continue
            target = self.folder / work[2]
            if work[1] == "aside" and not target.exists():
                os.rename(path, target)
            else:
                log.info("removing %s, which a stopped process left", path)
                _remove(path)
        self._mend_links()

    def is_good(self, folder: Path) -> bool:
        """Whether the checkpoint passes `verify`; reads its files only if they are not as they were the last time."""
        look = _look(folder)
        judged_look, good = self._judged.get(folder, (None, False))
        if judged_look == look:
            return good
        try:
            verify(folder)
            good = True
        except CheckpointError as error:
            log.warning("not counted as a checkpoint: %s", error)
            good = False
        self._judged[folder] = (look, good)
        return good

    def newest(self) -> Path | None:
        """The newest checkpoint whose manifest can be read."""
        readable, _ = _in_order(self.folder)
        return readable[0] if readable else None

    def next_sequence(self) -> int:
        """The number of the next save."""
        newest = self.newest()
        return 1 if newest is None else read_manifest(newest).sequence + 1

    def begin(self, step: int) -> Path:
        """An empty folder in which the step's checkpoint is to be written."""
        folder = step_folder(self.folder, step)
        if self._renames:
            folder = work_path(self.folder, "temp", folder.name)
        if folder.exists():  # of a save that failed and could not even be removed; in place, of another line
            _unmake(folder)
        folder.mkdir()
        return folder

    def publish(self, temp: Path, step: int) -> None:
        """Give a finished temporary folder its name, durably. What stood there is moved aside first, removed after."""
        target = step_folder(self.folder, step)
        aside = work_path(self.folder, "aside", target.name)
        replaces = temp != target and os.path.lexists(target)
        if replaces:
            os.rename(target, aside)
        reach("before-rename", step=step)
        try:
            if temp != target:
                os.rename(temp, target)
        except OSError:
            if replaces:
                os.rename(aside, target)
            raise
        reach("after-rename", step=step)
        sync(self.folder)
        reach("parent-synced", step=step)
        self._judged[target] = (_look(target), True)
        if replaces:
            _remove(aside)

    def link(self, name: str, step: int) -> None:
        """Let `latest`, `best` or `final` point to the step's checkpoint; a reader sees the old target or the new."""
        reach(f"before-{name}", step=step)
        self._link_to(name, step_folder(self.folder, step))
        reach(f"after-{name}", step=step)

    def delete_old(self, *, keep_last: int, step: int) -> None:
        """Delete what is older than the `keep_last` newest good checkpoints, but nothing that a link points to.

        Checkpoints that are not good do not count; they go when they are old. `step` is the one just saved.
        """
        reach("before-delete", step=step)
        readable, unreadable = _in_order(self.folder)
        kept: list[Path] = []
        old: list[Path] = []
        for folder in readable:
            if len(kept) == keep_last:
                old.append(folder)
            elif self.is_good(folder):
                kept.append(folder)
        if len(kept) == keep_last:
            oldest_step = min(_step_of(folder) for folder in kept)
            old += [folder for folder, _ in unreadable if _step_of(folder) < oldest_step]
        linked = {self._target(name) for name in (LATEST, BEST, FINAL)}
        for folder in old:
            if folder not in linked:
                self._delete(folder, step=step)
        reach("after-delete", step=step)

    def _delete(self, folder: Path, *, step: int) -> None:
        """First the name, or the manifest, at once; then the files. So no half of a checkpoint ever counts as one."""
        self._judged.pop(folder, None)
        trash = folder
        if self._renames:
            trash = work_path(self.folder, "trash", folder.name)
            os.rename(folder, trash)
        else:
            (folder / MANIFEST).unlink(missing_ok=True)
        reach("mid-delete", step=step)
        _remove(trash)

    def _target(self, name: str) -> Path | None:
        link = self.folder / name
        return follow(link) if is_pointer(link) else None

    def _link_to(self, name: str, target: Path) -> None:
        link = self.folder / name
        if link.exists() and not is_pointer(link):
            raise CheckpointError(f"{link} is in the way: it should be a link. Remove it or move it elsewhere")
        point(link, target.name, temporary=work_path(self.folder, "link", name))
        sync(self.folder)

    def _mend_links(self) -> None:
        """Move the links that the newest save was killed before moving; drop those whose checkpoint is gone or cut.

        This looks at names and sizes only: reading all files again would hold up every start.
        """
        newest = next((folder for folder in _in_order(self.folder)[0] if _looks_whole(folder)), None)
        due = {LATEST, *read_manifest(newest).links} if newest is not None else set()
        for name in (LATEST, BEST, FINAL):
            target = self._target(name)
            if newest is not None and name in due:
                if target != newest:
                    self._link_to(name, newest)
            elif target is not None and not _looks_whole(target):
                log.warning("%s pointed to %s, which is no whole checkpoint: the link was removed", name, target.name)
                (self.folder / name).unlink()
                sync(self.folder)


def probe_folder(checkpoints: Path) -> tuple[bool, list[str]]:
    """Whether folders can be renamed here, and what the file system lacks, as people say it."""
    before, after = (work_path(checkpoints, kind, "probe") for kind in ("temp", "trash"))
    link = work_path(checkpoints, "link", "probe")
    lacks = []
    before.mkdir(exist_ok=True)
    try:
        os.rename(before, after)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        lacks.append("renaming of folders")
    try:
        link.symlink_to(before.name)
    except OSError as error:
        if error.errno not in LACKING:
            raise
        lacks.append("links")
    for path in (before, after):
        if path.exists():
            path.rmdir()
    link.unlink(missing_ok=True)
    return "renaming of folders" not in lacks, lacks


def _unmake(folder: Path) -> None:
    """Remove a folder so that at no moment half of a checkpoint counts as one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    shutil.rmtree(folder)


def _in_order(checkpoints: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """Checkpoints with a manifest that can be read, newest first; and the others, each with what is wrong."""
    readable: list[tuple[int, int, Path]] = []
    unreadable: list[tuple[Path, str]] = []
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if not _STEP_NAME.fullmatch(folder.name) or folder.is_symlink():
            continue
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            unreadable.append((folder, str(error)))
            continue
        if manifest.step == _step_of(folder):
            readable.append((manifest.sequence, manifest.step, folder))
        else:
            unreadable.append((folder, f"{folder} holds step {manifest.step}: it was renamed"))
    unreadable.sort(key=lambda entry: _step_of(entry[0]), reverse=True)
    return [folder for _, _, folder in sorted(readable, reverse=True)], unreadable


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _looks_whole(folder: Path) -> bool:
    try:
        verify(folder, content=False)
    except CheckpointError:
        return False
    return True


def _look(folder: Path) -> _Look:
    """How every file looks from outside: as long as that stays, the content is taken to."""
    look: _Look = []
    for path in _walk(folder):
        status = path.lstat()
        look.append((str(path), status.st_size, status.st_mtime_ns))
    return sorted(look)


def _walk(folder: Path) -> Iterable[Path]:
    yield folder
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent, name) for name in folders + files)


def _is_abandoned(path: Path, *, host: str, pid: int) -> bool:
    """Whether the process that made a work file is gone. One on another machine is judged by the file's age."""
    if host == _host() and (pid == os.getpid() or not _is_alive(pid)):
        return True
    try:
        return time.time() - max(entry.lstat().st_mtime for entry in _walk(path)) > _ABANDONED_AFTER_SEC
    except FileNotFoundError:  # its owner has just removed it
        return False


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _remove(path: Path) -> None:
    """Remove a file, link or folder that is out of the way already: what cannot go now is said, and swept up later."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error.strerror)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
