"""Sends metrics and the resolved config to Weights & Biases, online or offline into <run>/wandb.

Nothing else of this process is recorded: no command line, no code, no git, no console, no list of packages. W&B's run
id is in <run>/tracking/wandb.json, so that a resumed run continues the same W&B run. W&B keeps the first line of a step
and ignores the second one of a step that is trained again after a kill.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

from llmtrain.config.sections.running import TrackingConfig, WandbConfig
from llmtrain.contracts import Unreachable
from llmtrain.tracking.remote_run import record_run, recorded_run

if TYPE_CHECKING:
    from wandb import Run

log = logging.getLogger("llmtrain.tracking")

DEFAULT_PROJECT: Final = "llmtrain"
_INIT_TIMEOUT_SEC = 60.0
_PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "disable_job_creation": True,
    "save_code": False,
    "silent": True,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,  # system/ is measured once, for all sinks
    "x_save_requirements": False,
}


class WandbSink:
    """One run of W&B. Raises ImportError when made, if wandb is not installed."""

    def __init__(
        self, config: WandbConfig, *, run: Path, mode: Literal["online", "offline"], finish_timeout_sec: float
    ) -> None:
        import wandb  # here, in the main thread: it takes a second  # noqa: F401

        self._folder = run
        self._run_name = config.run_name
        self._mode = mode
        self._project = config.project or os.environ.get("WANDB_PROJECT") or DEFAULT_PROJECT
        self._entity = config.entity or os.environ.get("WANDB_ENTITY") or None
        self._finish_timeout_sec = finish_timeout_sec
        self._recorded = recorded_run(run, "wandb")
        self._run: Run | None = None

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Create a W&B run, or continue that of a resumed run.

        Raises ValueError if nobody is logged in, Unreachable if the server does not answer, and the errors of W&B.
        """
        import wandb
        from wandb.errors import CommError

        try:
            if self._mode == "online" and not wandb.login(prompt=False):
                raise ValueError(
                    "nobody is logged in: run `wandb login`, set WANDB_API_KEY, or set tracking.wandb.mode=offline"
                )
            self._init(run_info)
        except CommError as error:
            raise Unreachable(str(error)) from error

    def _init(self, run_info: Mapping[str, Any]) -> None:
        import wandb

        is_same = (self._recorded.get("project"), self._recorded.get("entity")) == (self._project, self._entity)
        continues = run_info["resumed_step"] is not None and is_same and self._recorded.get("id")
        run_id = self._recorded["id"] if continues else secrets.token_hex(4)
        section = run_info["config"].get("run", {})
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            project=self._project,
            entity=self._entity,
            name=self._run_name or run_info["run_id"],
            notes=section.get("notes"),
            tags=section.get("tags") or None,
            mode=self._mode,
            dir=str(self._folder),
            config={"llmtrain_run_id": run_info["run_id"], **run_info["config"]},
            settings=wandb.Settings(
                **_PRIVATE, init_timeout=_INIT_TIMEOUT_SEC, finish_timeout=self._finish_timeout_sec
            ),
        )
        record_run(self._folder, "wandb", {"id": run_id, "project": self._project, "entity": self._entity})
        where = f"{self._folder / 'wandb'}, for `wandb sync`" if self._mode == "offline" else self._run.url
        log.info("W&B: run %s, %s", run_id, where)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Pass one line to W&B, which sends it later. Metrics of one step become one row."""
        assert self._run is not None, "start comes first"
        self._run.log(dict(metrics), step=step)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Send the remaining lines, and the state in which the run ended."""
        assert self._run is not None
        state = summary.get("state")
        for name in ("best_val_loss", "tokens_per_sec", "goodput"):
            if isinstance(summary.get(name), float):
                self._run.summary[name] = summary[name]
        if state == "preempted":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if state == "finished" else 1)


def make_wandb_sink(tracking: TrackingConfig, *, run: Path) -> WandbSink | None:
    """Return the sink; None if the mode is disabled. Raises ImportError without wandb, ValueError for a wrong mode."""
    wanted = tracking.wandb.mode or os.environ.get("WANDB_MODE") or "online"
    modes: dict[str, Literal["online", "offline"] | None] = {"online": "online", "offline": "offline", "disabled": None}
    if wanted not in modes:
        raise ValueError(f"WANDB_MODE is {wanted}: set it to online, offline or disabled")
    mode = modes[wanted]
    return mode and WandbSink(tracking.wandb, run=run, mode=mode, finish_timeout_sec=tracking.finish_timeout_sec)
