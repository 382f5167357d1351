"""Run folders: making one, finding one, and finding the model that somebody means.

    runs/<run_id>/{config.yaml, config.as-written.yaml, meta.json, metrics.jsonl, summary.json, heartbeat, logs/,
                   tensorboard/, checkpoints/, model}
    runs/latest → the newest run

What a checkpoint folder holds is in `training.checkpoint`.
"""

from __future__ import annotations

import difflib
import fcntl
import logging
import re
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from llmtrain.atomic import LACKING, follow, point, write_json, write_text
from llmtrain.config.loading.renamed import is_old_checkpoint
from llmtrain.config.sections.running import OutputConfig, RunConfig
from llmtrain.errors import ConfigError
from llmtrain.faults import reach
from llmtrain.models.fetch import fetch_model_or_adapter, is_model_folder
from llmtrain.runs.metadata import code_git_state, name_in, new_run_id, run_metadata, slug
from llmtrain.runs.stores import COPY_RECORD, address_of, check_store, fetch_run, has_model, runs_folder
from llmtrain.storage.address import is_remote, local_path, shown
from llmtrain.tracking.redaction import redact_config

log = logging.getLogger("llmtrain.run")

MODELS = "A MODEL is a run, a checkpoint, the folder of a model or an adapter, or owner/name on the Hub"
CONFIG = "config.yaml"
AS_WRITTEN = "config.as-written.yaml"
_UNFINISHED = re.compile(r"[\w.-]+\.\d+\.tmp")
"""A file that `atomic` had not finished."""
MAX_NAMED = 5
"""Checkpoints that a message names."""


def start_run(
    about: RunConfig, output: OutputConfig, *, decided: Mapping[str, Any], as_written: str | None = None
) -> Path:
    """Make the folder of a new run, with its meta.json. Raises ConfigError if it cannot be made.

    `decided`: what this start decided, for those that go on: `resolved`, every `auto` of the config, and `commits`, the
    commit of each branch that is read. `as_written`: the text of the config's file, which is kept, with secrets
    redacted; overrides are in meta.json's argv.
    """
    now, root = datetime.now(UTC), runs_folder(output.root_dir)
    run = create_run(root, output.run_id) if output.run_id else make_run(about, root)
    reach("run-made")
    meta = {"run_id": run.name, "notes": about.notes, "tags": about.tags, **decided}
    write_json(run / "meta.json", {**meta, **run_metadata(sys.argv, now=now)})
    if as_written is not None:
        write_text(run / AS_WRITTEN, redact_config(as_written))
    reach("run-described")
    return run


def begin_run(run: Path, config_yaml: str) -> None:
    """Write the config of a run that this process has locked. From then on it is a run; a new one is `latest`."""
    is_new = not is_run(run)
    write_text(run / CONFIG, config_yaml)
    if is_new:
        point(run.parent / "latest", run.name)


def make_run_id(about: RunConfig, *, now: datetime | None = None, mark: str = "") -> str:
    """Return the id of a run that starts now. `mark` tells apart what starts in one second, where no folder does."""
    git = code_git_state()
    return new_run_id(about.name, now=now or datetime.now(UTC), git_sha=git.sha if git else None, mark=mark)


def make_run(about: RunConfig, root: Path) -> Path:
    """Make the folder of a run under an id that no other process has taken, and return it, absolute.

    The id names this second, or a later one where other runs have taken those before it. Raises ConfigError.
    """
    now = datetime.now(UTC)
    if address := address_of(root):
        check_store(address, None)
    while True:
        folder = root.absolute() / make_run_id(about, now=now)
        if _make_folder(folder):
            return folder
        now += timedelta(seconds=1)


def create_run(root: Path, run_id: str) -> Path:
    """Make `root/run_id`, absolute, or take the one that a start left which was killed before it began the run.

    Raises ConfigError if there is a run of this id, or anything else.
    """
    folder = root.absolute() / run_id
    if address := address_of(root):
        check_store(address, run_id)
    if _make_folder(folder):
        return folder
    if never_began(folder) and not is_locked(folder):
        if any(folder.iterdir()):
            log.info("%s was left by a start that was stopped before the run began: it begins there", folder)
        return folder
    fix = f"go on with that run: llmtrain train --resume {run_id}" if is_run(folder) else "move it elsewhere"
    raise ConfigError(f"{folder} exists already: give another output.run_id, or {fix}")


def never_began(folder: Path) -> bool:
    """Return whether a start made this folder, and was stopped before its run began: nothing is in it to be lost."""
    if not folder.is_dir() or is_run(folder):
        return False
    made = {"meta.json", AS_WRITTEN, ".lock", COPY_RECORD}
    return all(path.name in made or _UNFINISHED.fullmatch(path.name) for path in folder.iterdir())


def _make_folder(folder: Path) -> bool:
    """Make the folder of a run; False if there is something of that name. Raises ConfigError if it cannot be made."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        return False
    except OSError as error:
        raise ConfigError(
            f"cannot make the run folder {folder}: {error.strerror}; choose another output.root_dir"
        ) from None
    return True


def point_to_latest(root: Path) -> None:
    """Let `root/latest` point to the newest of the runs that are there, by their names; without one it goes."""
    names = sorted(folder.name for folder in root.glob("*") if is_run(folder) and not folder.is_symlink())
    if names:
        point(root / "latest", names[-1])
    else:
        (root / "latest").unlink(missing_ok=True)


def find_run(ref: str, root: Path) -> tuple[Path, Path | None]:
    """Return the run folder that `ref` names, and the checkpoint if it names one.

    `ref` is `latest`, a run id, a run's name (the newest one's is meant), a run folder, a checkpoint folder, or the
    address of one of them in a store, from which it is fetched then. Raises ConfigError if it is none of these, and
    StorageError.
    """
    if is_remote(ref):
        if (stored := fetch_run(ref)) is None:
            raise ConfigError(
                f"{shown(ref)} is no run and no checkpoint of one: a run has a config.yaml and a meta.json"
            )
        return stored
    if found := _find_run(ref, root):
        return found
    if is_old_checkpoint(ref):
        raise ConfigError(f"{ref!r} is no checkpoint of a run: {_checkpoints_instead(ref, root)}")
    for folder in (root / ref, Path(ref)):
        if ref not in ("", ".", "latest") and never_began(folder) and any(folder.iterdir()):
            raise ConfigError(
                f"{folder} has nothing to resume: its start was stopped before the run began. Start it: llmtrain train "
                f"CONFIG output.run_id={folder.name}"
            )
    if Path(ref).is_dir() and ref != "latest":
        raise ConfigError(f"{ref} is no run and no checkpoint of one: a run has a config.yaml and a meta.json")
    runs = sorted(folder.name for folder in root.glob("*") if is_run(folder) and not folder.is_symlink())
    if not runs:
        raise ConfigError(f"there is no run {ref!r}: {root.absolute()} has no runs")
    near = difflib.get_close_matches(ref, runs, n=1) or [runs[-1]]
    raise ConfigError(f"there is no run {ref!r} in {root.absolute()}; did you mean {near[0]!r}?")


def _find_run(ref: str, root: Path) -> tuple[Path, Path | None] | None:
    for folder in (follow(root / ref).resolve(), follow(Path(ref)).resolve()):
        if is_run(folder):
            return folder, None
        if folder.parent.name == "checkpoints" and is_run(folder.parent.parent) and folder.is_dir():
            return folder.parent.parent, folder
    if "/" in ref or not ref:
        return None
    named = [run for run in root.glob(f"*-{slug(ref)}") if name_in(run.name) == slug(ref) and is_run(run)]
    return (max(named, key=lambda run: run.name).resolve(), None) if named else None


def _checkpoints_instead(ref: str, root: Path) -> str:
    """Name the checkpoints that exist: those of the run around `ref`, else of the newest run."""
    run = next((folder for folder in Path(ref).parents if is_run(folder)), follow(root / "latest").resolve())
    names = [folder.name for folder in sorted(run.glob("checkpoints/step_*"))]
    if names:
        more = f"; {len(names)} in all" if len(names) > MAX_NAMED else ""
        return f"{run / 'checkpoints'} has {', '.join(names[-MAX_NAMED:])}{more}"
    return f"a checkpoint is a folder RUN/checkpoints/step_000020, and {root.absolute()} has none"


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes from training in `run` meanwhile. Raises ConfigError if one does already.

    The lock is the process's (POSIX), so it ends with it however it ends, and a forked child does not hold it.
    """
    with (run / ".lock").open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in LACKING:
                log.warning("%s is on a file system without locks: see to it that one process alone trains in it", run)
                yield
                return
            raise ConfigError(f"{run} is being trained by another process: wait for it, or stop it") from None
        yield


def is_locked(run: Path) -> bool:
    """Return whether a process trains in `run` now, without taking the lock: that would turn a start away."""
    layout = "qqihh" if sys.platform == "darwin" else "hhqqi4x"  # struct flock
    free = (0, 0, 0, fcntl.F_WRLCK, 0) if sys.platform == "darwin" else (fcntl.F_WRLCK, 0, 0, 0, 0)
    try:
        with (run / ".lock").open("rb") as file:
            answer = struct.unpack(layout, fcntl.fcntl(file, fcntl.F_GETLK, struct.pack(layout, *free)))
    except OSError:
        return False
    return bool(answer[3 if sys.platform == "darwin" else 0] != fcntl.F_UNLCK)


def is_run(folder: Path) -> bool:
    """Return whether a start made `folder` and began its run."""
    return (folder / CONFIG).is_file() and (folder / "meta.json").is_file()


def find_model(ref: str, root: Path) -> Path:
    """Return the folder of the model or adapter that `ref` names.

    For a run it is that of its best checkpoint, else of the last one. Raises ConfigError if there is none.
    """
    if is_remote(ref):
        return fetch_model_or_adapter(ref) if (stored := fetch_run(ref)) is None else _model_of(*stored)
    here = follow(Path(local_path(ref))).resolve()
    if is_model_folder(here):
        return here
    if here.is_dir() and not is_run(here) and is_model_folder(here / "model"):
        return here / "model"
    try:
        run, checkpoint = find_run(ref, root)
    except ConfigError as error:
        raise ConfigError(f"{str(error).removesuffix('?')}. {MODELS}") from None
    return _model_of(run, checkpoint)


def _model_of(run: Path, checkpoint: Path | None) -> Path:
    if checkpoint is None:
        targets = [follow(run / "checkpoints" / name) for name in ("best", "final", "latest")]
        checkpoint = next((target.resolve() for target in targets if has_model(target)), None)
    if checkpoint is None or not (checkpoint / "model").is_dir():
        raise ConfigError(f"the run {run.name} has no checkpoint yet")
    return checkpoint / "model"


def model_to_begin_from(path: str, root: Path) -> str:
    """Return the model folder of the run or checkpoint that `model.path` names, else `path` as it is.

    Raises ConfigError if the run has no checkpoint yet.
    """
    if is_remote(path) or is_model_folder(Path(path).expanduser()) or _find_run(path, root) is None:
        return path
    return str(find_model(path, root))


def config_to_read(ref: str, root: Path) -> str:
    """Return the config.yaml of the run or checkpoint that `ref` names, else `ref`."""
    found = _find_run(str(Path(ref).resolve()) if Path(ref).exists() else ref, root)
    return ref if found is None else str((found[1] or found[0]) / "config.yaml")


def link_model(run: Path) -> None:
    """Let `run/model` point to the best checkpoint's model, else to the final one's."""
    for name in ("best", "final"):
        pointer = run / "checkpoints" / name
        if pointer.exists():
            folder = pointer if pointer.is_symlink() else follow(pointer)
            point(run / "model", str(folder.relative_to(run) / "model"))
            return
