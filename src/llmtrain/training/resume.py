"""Where a resumed run goes on, and whether it may: its folder, its newest good checkpoint, what must not have changed.

Finding the folder is in `runs`, judging a checkpoint in `checkpoint`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.training.checkpoint import CheckpointError, newest_good, verify
from llmtrain.training.runs import find_run, is_run


@dataclass(frozen=True)
class Origin:
    """The run that goes on."""

    run: Path
    checkpoint: Path | None
    """The one that the user named; None: the newest good one."""
    resolved: Mapping[str, Any]
    """Every `auto` as the run's start decided it."""
    or_anew: bool = False
    """Whether it begins anew, in its folder, where it has no checkpoint yet."""


def find_origin(ref: str, root: Path) -> Origin:
    """The run, or the checkpoint of one, that `ref` names. Raises ConfigError if there is none."""
    run, checkpoint = find_run(ref, root)
    try:
        meta = json.loads((run / "meta.json").read_text(encoding="utf-8"))
        return Origin(run, checkpoint, meta["resolved"])
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{run / 'meta.json'} is damaged ({error}), so {run.name} cannot be resumed") from None


def find_origin_if_any(run_id: str | None, root: Path) -> Origin | None:
    """The run of this id, to go on with if it was started already; for `--resume auto`.

    Raises ConfigError without an id: a run that is made anew at each start would never be found again.
    """
    if run_id is None:
        raise ConfigError("--resume auto needs output.run_id: the run that is to be gone on with, or started")
    if not is_run(root / run_id):
        return None
    return dataclasses.replace(find_origin(run_id, root), or_anew=True)


def checkpoint_of(origin: Origin) -> tuple[Path | None, list[str]]:
    """The verified checkpoint to go on from, and what is wrong with newer ones.

    Raises ConfigError if there is none and the run may not begin anew.
    """
    try:
        if origin.checkpoint is not None:
            verify(origin.checkpoint)
            return origin.checkpoint, []
        found = newest_good(origin.run / "checkpoints")
    except CheckpointError as error:
        raise ConfigError(f"cannot resume: {error}") from error
    if found is None and origin.or_anew:
        return None, []
    if found is None:
        raise ConfigError(f"{origin.run} has no checkpoint yet, so there is nothing to resume: start the run anew")
    return found


Identity = Mapping[str, Mapping[str, Any]]
"""What must not change while a run goes on: values by section (model, data), then key."""


def identity_of(model: Mapping[str, Any], *, seed: int, seq_len: int, fingerprint: str) -> Identity:
    """With another model the tensors differ; with another seed, length or data the items do."""
    return {
        "model": dict(model),
        "data": {"seed": seed, "seq_len": seq_len, "fingerprint": fingerprint},
    }


def refuse_another_run(then: Identity, now: Identity, *, where: Path) -> None:
    """Raise ConfigError if the model or the data differ from what the checkpoint `where` was made with."""
    for section, values in then.items():
        changes = [
            f"{key} {values.get(key)} → {now[section].get(key)}"
            for key in sorted({*values, *now[section]})
            if values.get(key) != now[section].get(key)
        ]
        if changes:
            raise ConfigError(
                f"{where} was made with another {section} ({', '.join(changes)}): resume it with its own config, "
                "by leaving CONFIG out, or start a new run"
            )
