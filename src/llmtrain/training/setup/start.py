"""Find where a run starts: its config, the checkpoint that it goes on from, and the processes that compute it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

from llmtrain.config.commits import with_commits
from llmtrain.config.loading.flat import flat
from llmtrain.config.loading.load import LoadedConfig, load_config
from llmtrain.config.sections.running import OutputConfig
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.strategy import Choice, reject_strategy
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import MAX_NAMED
from llmtrain.runs.listing import side_by_side
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.redaction import redact
from llmtrain.tracking.sink_group import check_own_sinks
from llmtrain.training.checkpoint import load_state
from llmtrain.training.resume import (
    Identity,
    Origin,
    best_of,
    checkpoint_of,
    find_origin,
    find_origin_if_any,
    reject_another_run,
    reject_other_id,
)
from llmtrain.training.setup.initial_model import with_model_found
from llmtrain.training.state import LossScale, RunState

AUTO = "auto"
"""Value of `resume` that goes on with output.run_id if that run was started already, and else starts it."""

_OF_ONE_PROCESS: Final[Mapping[str, Any]] = {"run": {"device"}, "distributed": {"rendezvous"}, "logging": True}
"""Keys that may differ between the processes of a run."""

ChooseStrategy = Callable[..., Choice]
"""Chooses the strategy of a config: `(config, *, world_size, precision, memory_bytes)`, as `planning.strategy_for`."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Config, folder and checkpoint that a run starts from."""

    config: Config
    origin: Origin | None
    """The run that goes on; None: a new one."""
    as_read: Config
    """The config before paths in it were looked up on this machine: it is the same on all ranks."""
    as_written: str | None
    """The text of the config's file; None where a run goes on with its own."""
    commits: Mapping[str, str] = field(default_factory=dict)
    """Commit of each branch of lakeFS that the config named, by `lakefs://repository/branch`."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Point of a run at which this process starts, and the tensors that it starts with."""

    state: RunState
    checkpoint: Path | None
    """Holds the tensors; None: a new run."""
    passed_over: Sequence[str]
    """Reason for passing over each newer checkpoint."""
    saved: Mapping[str, Any]
    """Content of the checkpoint's state.json."""


def find_start(loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str] = ()) -> Start:
    """Find the config, and the run that `resume` names. Raises ConfigError if one of them cannot be had."""
    config, origin = _config_and_origin(loaded, resume=resume, overrides=overrides)
    as_written = loaded.as_written if loaded else None
    return Start(config=with_model_found(config), origin=origin, as_read=config, as_written=as_written)


def _config_and_origin(
    loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str]
) -> tuple[Config, Origin | None]:
    if resume is None:
        if loaded is None:
            raise ConfigError("train needs a CONFIG, or --resume to go on with a run")
        return loaded.config, None
    if loaded is not None:
        output = loaded.config.output
        if resume == AUTO:
            origin = find_origin_if_any(output.run_id, output.root_dir)
            return _as_started(loaded.config, origin), origin
        origin = find_origin(resume, output.root_dir)
        reject_other_id(output.run_id, origin)
        return loaded.config, origin
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    origin = find_origin(resume, given.get("output.root_dir", OutputConfig().root_dir))
    config = load_config(str(origin.run / "config.yaml"), overrides).config
    if "output.run_id" in given:
        reject_other_id(config.output.run_id, origin)
    return config, origin


def _as_started(config: Config, origin: Origin | None) -> Config:
    """Return the run's own config for processes that torchrun starts again: the file may have changed meanwhile."""
    if origin is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return config
    own = load_config(str(origin.run / "config.yaml")).config
    return own.model_copy(update={"distributed": config.distributed})  # which the run does not record


def open_engine(start: Start, *, choose_strategy: ChooseStrategy) -> Engine:
    """Decide every `auto` as the run's start did, or by this machine; join the other processes; set up the log."""
    config, origin = start.config, start.origin
    setup_logging(config.logging, run_folder=None, rank=int(os.environ.get("RANK", "0")))
    check_own_sinks(config.tracking)
    resolved = resolve(
        config.run,
        config.trainer,
        config.distributed,
        previous=origin.resolved if origin else None,
        choose=partial(choose_strategy, config),
    )
    reject_strategy(config, strategy=resolved.strategy, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    engine = Engine(resolved, distributed=config.distributed, deterministic=config.run.deterministic)
    check_agreement(engine, config=start.as_read)
    setup_logging(config.logging, run_folder=None, rank=engine.rank)
    return engine


def at_commits(start: Start, engine: Engine) -> Start:
    """Return `start` with commits in place of branches of lakeFS: those of the run that goes on, else those of now.

    One rank asks, so that all read the same. Raises what `with_commits` does.
    """
    known = start.origin.commits if start.origin else {}
    config, commits = engine.from_main(partial(with_commits, start.config, known))
    return replace(start, config=config, commits=commits)


def check_agreement(engine: Engine, *, config: Config | None = None) -> None:
    """Raise ConfigError on every rank if they read different configs, or their machines decided `auto` differently."""
    resolved = engine.resolved
    if config is not None:
        _reject_different(engine.gather(flat(config.model_dump(mode="json", exclude=dict(_OF_ONE_PROCESS)))))
    ranks = engine.gather((resolved.precision, resolved.compile, resolved.strategy, resolved.bf16))
    if len(set(ranks)) > 1:
        told = "; ".join(f"rank {rank}: {values[0]}, compile {values[1]}" for rank, values in enumerate(ranks))
        raise ConfigError(
            f"the processes' machines differ in what auto takes ({told}): set trainer.precision and trainer.compile"
        )


def _reject_different(configs: Sequence[Mapping[str, Any]]) -> None:
    """Raise ConfigError that names the keys in which the configs of two ranks differ."""
    for rank, config in enumerate(configs):
        rows = side_by_side([configs[0], config], only_different=True)
        if not rows:
            continue
        changes = [f"{row['key']} is {_shown(row, 0)} on rank 0 and {_shown(row, 1)} on rank {rank}" for row in rows]
        more = f", and {len(changes) - MAX_NAMED} more" if len(changes) > MAX_NAMED else ""
        raise ConfigError(
            f"the processes read different configs: {'; '.join(changes[:MAX_NAMED])}{more}. Give all the same file "
            "and the same overrides; if it changed while they started, start them again"
        )


def _shown(row: Mapping[str, Any], column: int) -> Any:
    return redact({row["key"].rpartition(".")[2]: row["values"][column]}).popitem()[1]


def find_position(start: Start, identity: Identity, engine: Engine) -> Position:
    """Verify the newest good checkpoint, or the one that was named, and read where it stands.

    Raises ConfigError if there is none, or it is one of another model or other data.
    """
    origin, state, saved = start.origin, RunState(), dict[str, Any]()
    checkpoint, passed_over = engine.from_main(lambda: checkpoint_of(origin) if origin else (None, []))
    if checkpoint:
        saved = load_state(checkpoint)
        reject_another_run(saved["identity"], identity, where=checkpoint, has_config=start.as_written is not None)
        state = RunState.from_dict(saved["position"])
        if best := engine.from_main(lambda: best_of(origin.run) if origin else None):
            state.keep_best_of(RunState.from_dict(best), metric=start.config.trainer.keep_best)
    if engine.resolved.precision == "16-mixed":
        state.loss_scale = state.loss_scale or LossScale()
    return Position(state=state, checkpoint=checkpoint, passed_over=passed_over, saved=saved)
