"""Resume: find the run and the checkpoint to go on from, and check that its model and data are the same.

    --resume REF ─ find_origin ─▶ Origin ─ checkpoint_of ─▶ verified checkpoint ─ reject_another_run ─▶ the run goes on

Run folders are found, or fetched from a store, by `runs`; checkpoints are verified by `training.checkpoint`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmtrain.atomic import follow
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import find_run, is_run, never_began
from llmtrain.runs.stores import CopyRecord, address_of, fetch_newest, fetched_runs, runs_folder
from llmtrain.runs.upload_owner import wait_until_free
from llmtrain.storage.failures import StorageError
from llmtrain.training.checkpoint import CheckpointError, load_state, newest_good, verify


@dataclass(frozen=True)
class Origin:
    """Run that is resumed."""

    run: Path
    checkpoint: Path | None
    """The checkpoint that the user named; None: the newest good one."""
    resolved: Mapping[str, Any]
    """The value of every `auto`, as the first start of the run decided it."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Commit of each branch of lakeFS that the first start of the run read."""
    may_start_over: bool = False
    """True if the run may start from the beginning, in its folder, when it has no checkpoint yet."""


def find_origin(ref: str, root_dir: str) -> Origin:
    """Find the run, or the checkpoint of a run, that `ref` names; one in a store is fetched.

    Raises ConfigError if there is none, or if another machine trains it, and StorageError.
    """
    run, checkpoint = find_run(ref, fetched_runs(root_dir, ref))
    _fetch_checkpoints(run)
    try:
        meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
        return Origin(run, checkpoint, meta["resolved"], meta.get("commits", {}))
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{run / 'meta.json'} is damaged ({error}), so {run.name} cannot be resumed") from None


def reject_other_id(run_id: str | None, origin: Origin) -> None:
    """Raise ConfigError if the user names the run otherwise: it goes on in its own folder."""
    if run_id not in (None, origin.run.name):
        raise ConfigError(
            f"output.run_id is {run_id}, but --resume continues the run {origin.run.name} in its own folder: leave "
            "output.run_id out; or, for a new run that begins with these weights, leave --resume out and name "
            f"{origin.checkpoint or origin.run} as model.init_from (model.path for a model of transformers)"
        )


def _fetch_checkpoints(run: Path) -> None:
    """Fetch the checkpoints of a run in a store, once nobody trains it. Go by the copy here if the store is down."""
    address = address_of(run)
    if address is None:
        return
    try:
        if int(os.environ.get("RANK", "0")) == 0:
            wait_until_free(address)
        fetch_newest(run)
    except StorageError as error:
        if not CopyRecord.of(run).pending:
            raise
        logging.getLogger("llmtrain.store").warning("%s: going on from the copy in %s", error, run)


def find_origin_if_any(run_id: str | None, root_dir: str) -> Origin | None:
    """Find the run of this id, for `--resume auto`; None if it was not started yet.

    Raises ConfigError without an id: each start would make a new run, and none would find the one before.
    """
    if run_id is None:
        raise ConfigError("--resume auto needs output.run_id: the name of the run to resume, or to start")
    folder = runs_folder(root_dir) / run_id
    if not never_began(folder):  # else this start has just made it
        fetched_runs(root_dir, run_id)
    if not is_run(folder):
        return None
    return dataclasses.replace(find_origin(str(folder), root_dir), may_start_over=True)


def checkpoint_of(origin: Origin) -> tuple[Path | None, list[str]]:
    """Return the verified checkpoint to go on from, and what is wrong with newer ones.

    Raises ConfigError if there is none and the run may not start over.
    """
    try:
        if origin.checkpoint is not None:
            verify(origin.checkpoint)
            return origin.checkpoint, []
        found = newest_good(origin.run / "checkpoints")
    except CheckpointError as error:
        raise ConfigError(f"cannot resume: {error}") from error
    if found is None and origin.may_start_over:
        return None, []
    if found is None:
        raise ConfigError(f"{origin.run} has no checkpoint yet, so there is nothing to resume: start a new run")
    return found


def best_of(run: Path) -> dict[str, Any] | None:
    """Return the position that the run's best checkpoint holds; None if there is none that can be read."""
    try:
        position: dict[str, Any] = load_state(follow(run / "checkpoints" / "best"))["position"]
    except (OSError, ValueError, KeyError):
        return None
    return position


Identity = Mapping[str, Mapping[str, Any]]
"""Values that must not change when a run is resumed, by section (model, data) and key."""


def identity_of(model: Mapping[str, Any], *, seed: int, seq_len: int, fingerprint: str) -> Identity:
    """Return what must not change: with another model the tensors differ, with other data the sequences do."""
    return {
        "model": dict(model),
        "data": {"seed": seed, "seq_len": seq_len, "fingerprint": fingerprint},
    }


def reject_another_run(then: Identity, now: Identity, *, where: Path, has_config: bool) -> None:
    """Raise ConfigError if the model or the data differ from those that the checkpoint `where` was made with.

    `has_config`: whether the user gave a config, in place of the run's own.
    """
    for section, values in then.items():
        changes = [
            f"{key} {values.get(key)} → {now[section].get(key)}"
            for key in sorted({*values, *now[section]})
            if values.get(key) != now[section].get(key)
        ]
        if changes:
            fix = "resume it with its own config, by leaving CONFIG out"
            if not has_config:
                was = "the files of the data as they were" if section == "data" else "the model as it was"
                fix = f"restore {was}, without overrides that change it"
            raise ConfigError(
                f"{where} was made with another {section} ({', '.join(changes)}): {fix}, or start a new run"
            )
