"""The checkpoint directory of a run: which checkpoint is the newest, where links point, what may be deleted.

    checkpoints/
      step_000500/  step_001000/  step_001500/
      latest → step_001500    best → step_001000    final → …     links with relative targets
      kept-step_000500                                            the best, of a course that the run went back from
      left-step_000500                                            what the best had to give way to; deleted by a save
      .temp-… .aside-… .trash-… .link-…                           work of a process; gone when it is done

"Newest" means the order of saving, which the manifests number, and not the step. A run that is resumed from an old
checkpoint makes that one the newest at once, so the higher steps that it leaves behind are never taken for its own,
even if it is killed before it saves again.

Where folders cannot be renamed (a mounted object store) a checkpoint is written in its place. It does not count without
its manifest, which is written last and deleted first.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

import psutil

from llmtrain.atomic import LACKING, follow, is_pointer, point, sync
from llmtrain.faults import reach
from llmtrain.training.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    CheckpointManifest,
    read_manifest,
    renumber,
    verify,
)

log = logging.getLogger("llmtrain.checkpoint")

LATEST, BEST, FINAL = "latest", "best", "final"

_STEP_NAME = re.compile(r"step_(\d{6,})")
_WORK_NAME = re.compile(r"\.(temp|aside|trash|link)-(\w+)-(.+)-(\d+)")
_ABANDONED_AFTER_SEC = 3600.0
"""A save touches its folder all the time: one left alone for so long belongs to a process that is gone."""
_RENAMES = "renaming of folders"
_KEPT = "kept-"
"""Before the name of a checkpoint whose step was saved anew while `best` points to it."""
_LEFT = "left-"
"""Before the name of a checkpoint whose place was taken by a `kept-` one that the run went back to."""

_Fingerprint = list[tuple[str, int, int]]
"""Path, size in bytes and time of change in ns of every file of a checkpoint."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return checkpoints / f"step_{step:06d}"


def step_of(folder: Path) -> int:
    """Return the step of a checkpoint's folder."""
    return int(folder.name.rpartition("step_")[2])


def newest_good(checkpoints: Path) -> tuple[Path, list[str]] | None:
    """Return the newest checkpoint that passes `verify`, and what is wrong with each newer one; None if there is none.

    Changes nothing. Raises CheckpointError if there are checkpoints and none of them is good.
    """
    skipped: list[str] = []
    readable, unreadable = _read_manifests(checkpoints)
    for folder, _ in readable:
        try:
            verify(folder)
        except CheckpointError as error:
            skipped.append(str(error))
            continue
        newer = [why for other, why in unreadable if step_of(other) > step_of(folder)]
        return folder, newer + skipped
    if skipped := [why for _, why in unreadable] + skipped:
        raise CheckpointError(f"no checkpoint in {checkpoints} is good:\n  " + "\n  ".join(skipped))
    return None


def probe_folder(folder: Path) -> list[str]:
    """Return what the file system of a folder lacks, in words: renaming of folders, links."""
    before, after, link = (work_path(folder, kind, "probe") for kind in ("temp", "trash", "link"))
    lacks = []
    before.mkdir(exist_ok=True)
    attempts = {_RENAMES: partial(os.rename, before, after), "links": partial(os.symlink, before.name, link)}
    for feature, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            if error.errno not in LACKING:
                raise
            lacks.append(feature)
    for path in (before, after):
        if path.exists():
            path.rmdir()
    link.unlink(missing_ok=True)
    return lacks


def work_path(checkpoints: Path, kind: str, name: str) -> Path:
    """Return a hidden name for work in progress, which says whose it is. `kind`: temp, aside, trash or link."""
    return checkpoints / f".{kind}-{name}-{_host()}-{os.getpid()}"


class CheckpointDirectory:
    """The `checkpoints` folder of a run, for the one process that writes to it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._renames = True
        self._verified: dict[Path, tuple[_Fingerprint, bool]] = {}

    def clean_up(self) -> None:
        """Finish what a killed process left: remove its work, put back what it moved aside, mend the links.

        First find out what the file system lacks, and log it.
        """
        lacks = probe_folder(self.folder)
        self._renames = _RENAMES not in lacks
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
        """Tell whether a checkpoint passes `verify`. Its files are read only if they changed since the last time."""
        fingerprint = _fingerprint(folder)
        then, good = self._verified.get(folder, (None, False))
        if then == fingerprint:
            return good
        try:
            verify(folder)
            good = True
        except CheckpointError as error:
            log.warning("not counted as a checkpoint: %s", error)
            good = False
        self._verified[folder] = (fingerprint, good)
        return good

    def newest(self) -> tuple[Path, CheckpointManifest] | None:
        """Return the newest checkpoint whose manifest can be read."""
        readable, _ = _read_manifests(self.folder)
        return readable[0] if readable else None

    def go_on_from(self, folder: Path) -> Path:
        """Make the checkpoint that the run goes on from its newest, and return where it then is.

        One that was `kept-` gets the name of its step again; what has it is of the course that the run leaves.
        """
        if folder.name.startswith((_KEPT, _LEFT)):
            folder = self._take_back(folder)
        newest = self.newest()
        if newest is not None and newest[0] != folder and folder.is_dir():
            reach("before-going-back")
            renumber(folder, newest[1].sequence + 1, links=[LATEST])
            reach("after-going-back")
            self._link_to(LATEST, folder)
        return folder

    def begin(self, step: int, *, is_best: bool) -> Path:
        """Make an empty folder in which the step's checkpoint is written, the best so far if `is_best`."""
        folder = step_folder(self.folder, step)
        if self._renames:
            folder = work_path(self.folder, "temp", folder.name)
        elif not is_best:
            self._keep_best(folder)
        if folder.exists():  # left by a save that failed and could not remove it; in place, an older checkpoint
            (folder / MANIFEST).unlink(missing_ok=True)  # first, so that no half of a checkpoint counts as one
            shutil.rmtree(folder)
        folder.mkdir()
        return folder

    def publish(self, temp: Path, step: int, *, is_best: bool) -> None:
        """Give a finished temporary folder its name, durably. A folder of that name is moved aside, then removed.

        Unless this one `is_best`, `best` keeps what it points to, under another name.
        """
        target = step_folder(self.folder, step)
        if temp != target and not is_best:
            self._keep_best(target)
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
        self._verified[target] = (_fingerprint(target), True)
        if replaces:
            _remove(aside)

    def link(self, name: str, step: int) -> None:
        """Let `latest`, `best` or `final` point to the step's checkpoint; a reader sees the old target or the new."""
        reach(f"before-{name}", step=step)
        self._link_to(name, step_folder(self.folder, step))
        reach(f"after-{name}", step=step)

    def delete_old(self, *, keep_last: int, step: int, course: Collection[int]) -> None:
        """Delete all that is older than the `keep_last` newest good checkpoints, except what a link points to.

        A checkpoint that is not good does not count, and is deleted once it is old. `step` is the one just saved.
        `course`: the steps that this process saved or went on from. What an earlier course of the run saved after them
        counts as older, so that a run that was sent back keeps the checkpoint that it was sent back to.
        """
        reach("before-delete", step=step)
        readable, unreadable = _read_manifests(self.folder)
        readable.sort(key=lambda found: found[1].step > min(course, default=step) and found[1].step not in course)
        kept: list[Path] = []
        old: list[Path] = []
        for folder, _ in readable:
            if len(kept) == keep_last:
                old.append(folder)
            elif self.is_good(folder):
                kept.append(folder)
        if len(kept) == keep_last:
            oldest_step = min(step_of(folder) for folder in kept)
            old += [folder for folder, _ in unreadable if step_of(folder) < oldest_step]
        linked = {self._target(name) for name in (LATEST, BEST, FINAL)}
        old += [*self.folder.glob(f"{_KEPT}*"), *self.folder.glob(f"{_LEFT}*")]
        for folder in old:
            if folder not in linked:
                self._delete(folder, step=step)
        reach("after-delete", step=step)

    def _keep_best(self, folder: Path) -> None:
        """Give a checkpoint another name if `best` points to it: a worse one of the same step takes its place."""
        if self._target(BEST) != folder or not folder.exists() or not self.is_good(folder):
            return
        kept = folder.with_name(_KEPT + folder.name)
        if kept.exists():  # of an earlier time
            shutil.rmtree(kept)
        if self._renames:
            os.rename(folder, kept)
        else:
            shutil.copytree(folder, kept)
        self._link_to(BEST, kept)

    def _take_back(self, kept: Path) -> Path:
        """Give a `kept-` or `left-` checkpoint the name of its step again, and return where it then is."""
        folder = step_folder(self.folder, step_of(kept))
        if not self._renames:
            _remove(folder)
            shutil.copytree(kept, folder)
        else:
            aside = work_path(self.folder, "aside", folder.name)
            if is_taken := folder.exists():
                os.rename(folder, aside)
            os.rename(kept, folder)
            if is_taken:
                left = folder.with_name(_LEFT + folder.name)
                if left.exists():
                    shutil.rmtree(left)
                os.rename(aside, left)
        if self._target(BEST) == kept:
            self._link_to(BEST, folder)
        if kept.exists():  # it was copied
            _remove(kept)
        return folder

    def _delete(self, folder: Path, *, step: int) -> None:
        """Remove the name or the manifest, then the files, so that no half of a checkpoint ever counts as one."""
        self._verified.pop(folder, None)
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
        """Move the links that the newest save was killed before moving; remove those without a complete checkpoint.

        Only names and sizes are checked: reading all files again would hold up every start.
        """
        readable, _ = _read_manifests(self.folder)
        newest, manifest = next(((folder, found) for folder, found in readable if _is_complete(folder)), (None, None))
        due = {LATEST, *manifest.links} if manifest is not None else set()
        for name in (LATEST, BEST, FINAL):
            target = self._target(name)
            if newest is not None and name in due:
                if target != newest:
                    self._link_to(name, newest)
            elif target is not None and (other := _under_its_other_name(target)) is not None:
                self._link_to(name, other)
            elif target is not None and not _is_complete(target):
                log.warning(
                    "%s pointed to %s, which is not a complete checkpoint: the link was removed", name, target.name
                )
                (self.folder / name).unlink()
                sync(self.folder)


def _read_manifests(checkpoints: Path) -> tuple[list[tuple[Path, CheckpointManifest]], list[tuple[Path, str]]]:
    """Return the checkpoints whose manifest can be read, newest first; and the others, each with what is wrong."""
    readable: list[tuple[Path, CheckpointManifest]] = []
    unreadable: list[tuple[Path, str]] = []
    for folder in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if not _STEP_NAME.fullmatch(folder.name) or folder.is_symlink():
            continue
        try:
            manifest = read_manifest(folder)
        except CheckpointError as error:
            unreadable.append((folder, str(error)))
            continue
        if manifest.step == step_of(folder):
            readable.append((folder, manifest))
        else:
            unreadable.append((folder, f"{folder} holds step {manifest.step}: it was renamed"))
    readable.sort(key=lambda found: (found[1].sequence, found[1].step), reverse=True)
    unreadable.sort(key=lambda found: step_of(found[0]), reverse=True)
    return readable, unreadable


def _is_complete(folder: Path) -> bool:
    try:
        verify(folder, content=False)
    except CheckpointError:
        return False
    return True


def _under_its_other_name(target: Path) -> Path | None:
    """Return where the checkpoint that a link means is, if a kill came between its renaming and the link's."""
    kept = target.with_name(_KEPT + target.name)
    if _is_complete(kept):
        return kept
    plain = target.with_name(target.name.removeprefix(_KEPT))
    return plain if not target.exists() and _is_complete(plain) else None


def _fingerprint(folder: Path) -> _Fingerprint:
    """Return how every file looks from outside: as long as that stays, the content is taken to be the same."""
    looks = ((path, path.lstat()) for path in (folder, *folder.rglob("*")))
    return sorted((str(path), status.st_size, status.st_mtime_ns) for path, status in looks)


def _is_abandoned(path: Path, *, host: str, pid: int) -> bool:
    """Tell whether the process that made a work file is gone. One on another machine is judged by the file's age."""
    if host == _host() and (pid == os.getpid() or not psutil.pid_exists(pid)):
        return True
    try:
        return time.time() - max(each.lstat().st_mtime for each in (path, *path.rglob("*"))) > _ABANDONED_AFTER_SEC
    except FileNotFoundError:  # its owner has just removed it
        return False


def _remove(path: Path) -> None:
    """Remove a file, link or folder that is out of the way. What cannot be removed is logged, and left for later."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error.strerror)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
