"""A run while it trains: sinks, events, progress and checkpoints are opened for the loop, and closed in order after it.

open: sinks · event log · checkpoint store · machine monitor · progress ─▶ fit
close: summary.json ─▶ the last save ends ─▶ runs/<id>/model links to it ─▶ sinks finish ─▶ report.html
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from llmtrain.config.loading.load import to_yaml
from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.sources import left_out_paths
from llmtrain.data.mixture_report import change_in_words, lines_of
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.limits import allowed_cores
from llmtrain.distributed.strategy import global_batch_size
from llmtrain.errors import Preempted
from llmtrain.models.float8 import flops_as_bf16
from llmtrain.reports.run_page import REPORT_NAME, report_at_end
from llmtrain.runs.attempts import forget_restarts
from llmtrain.runs.events import EVENTS_NAME, EventLog
from llmtrain.runs.folders import link_model
from llmtrain.runs.heartbeat import HEARTBEAT_NAME, Heartbeat
from llmtrain.runs.json_files import json_object
from llmtrain.runs.stores import address_of
from llmtrain.runs.summary import ParameterCount, RunSummary
from llmtrain.screen import counted
from llmtrain.tracking.gpus import device_peak_flops
from llmtrain.tracking.machine_monitor import MachineMonitor, metrics_of_all_ranks
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.sink_group import start_sinks
from llmtrain.tracking.slowdown import MachineCounters, Needs
from llmtrain.tracking.system import peak_memory_bytes
from llmtrain.tracking.times import Activity
from llmtrain.training.checkpoint import CheckpointStore
from llmtrain.training.job import Job
from llmtrain.training.learning_rate import highest_scale, warmup_steps
from llmtrain.training.report import BatchLog, Compute, Outputs, Reporter
from llmtrain.training.saves import Saves
from llmtrain.training.schedule import Schedule
from llmtrain.training.setup.ingredients import recorded_ingredients
from llmtrain.training.slow_steps import SlowSteps
from llmtrain.training.state import RunState


@dataclass
class Session:
    """Resources that the loop gets besides the job, and how it ended."""

    report: Reporter
    events: EventLog
    saves: Saves
    job: Job
    outcome: Literal["finished", "preempted", "failed"] = "failed"

    def __post_init__(self) -> None:
        self.summary = self.summarize()

    def save(self, best: bool, final: bool) -> None:
        """Begin to save a checkpoint of this moment."""
        self.saves.begin(best=best, final=final, spent=self.report.spent_so_far())

    def save_beginning(self) -> None:
        """Save before the first step where a run may roll back, so that there is always something to go back to."""
        if self.job.state.step == 0 and self.job.config.trainer.non_finite == "rollback":
            self.save(False, False)

    def ended(self, run: Path, *, finished: bool) -> None:
        """Note how the loop ended, once the last checkpoint is on the disk."""
        with self.report.spent("saving"):
            self.saves.finish()
        self.outcome = "finished" if finished else "preempted"
        for line in lines_of(self.summarize().mixture or []):
            _log("data", "%s", line)
        if not finished:
            self.events.add("stopped", step=self.job.state.step)
        if self.job.engine.is_main:
            forget_restarts(run)

    def summarize(self) -> RunSummary:
        """Return what the run came to so far."""
        return self.report.summary(
            self.job.state,
            self.outcome,
            parameters=ParameterCount.of(self.job.trained.module),
            peak_memory_bytes=peak_memory_bytes(self.job.engine.device),
            resumed_step=self.job.resumed_step,
        )


def result_of(run: Path, summary: Mapping[str, Any], state: RunState, *, finished: bool = True) -> dict[str, Any]:
    """Return what the command prints about a run that is finished. Raises Preempted for one that was stopped."""
    if not finished:
        raise Preempted(f"step {state.step} is saved; to go on: llmtrain train --resume {address_of(run) or run}")
    validation = {name.replace("/", "_"): value for name, value in state.validation.items()}
    page = str(run / REPORT_NAME) if (run / REPORT_NAME).is_file() else None
    stored = {"address": address} if (address := address_of(run)) else {}
    return {"run": str(run), **stored, "model": str(run / "model"), "report": page, **summary, **validation}


def already_finished(job: Job) -> dict[str, Any] | None:
    """Return the result of a run that is resumed and has nothing left to do; None if it has.

    Nothing of it is changed: its summary and its config tell how it was trained.
    """
    origin, state = job.start.origin, job.state
    if origin is None or not job.schedule.is_over(state):
        return None
    summary = json_object(origin.run / "summary.json", problems=[])
    if (summary.get("state"), summary.get("steps")) != ("finished", state.step):
        return None
    message = "%s is finished, at step %d: nothing is left to train. To go on, raise its limit (trainer.max_steps)"
    logging.getLogger("llmtrain.resume").warning(message, origin.run.name, state.step)
    return result_of(origin.run, summary, state)


@contextmanager
def open_session(run: Path, job: Job) -> Iterator[Session]:
    """Open all that writes into the run's folder, and close it however the block ends. On every rank."""
    config, engine = job.config, job.engine
    sinks = start_sinks(
        config.tracking,
        run=run,
        config=config.model_dump(mode="json"),
        resumed_step=job.resumed_step,
        is_main=engine.is_main,
    )
    events = EventLog(run / EVENTS_NAME if engine.is_main else None)
    if job.resumed_step is not None:
        events.add("resumed", step=job.resumed_step)
    with (
        recorded_ingredients(run, config, job.data) if engine.is_main else nullcontext(),
        Heartbeat(run / HEARTBEAT_NAME if engine.is_main else None, progressed=lambda: engine.watchdog.last_beat),
        MachineMonitor(run=run, device=engine.device, interval_sec=config.tracking.system_interval_sec) as monitor,
        Progress(job.schedule.total_steps, start_step=job.state.step, quiet=not engine.is_main) as progress,
    ):
        report = _reporter(job, Outputs(sinks, events, progress), monitor)
        session = Session(report, events, Saves(_open_store(job, run, saved=report.saved), job, events), job)
        try:
            yield session
        finally:
            summary = session.summary = session.summarize()
            with ExitStack() as ends:  # the last one first; each is done though one before it failed
                ends.callback(_on_main(engine, report_at_end, run))
                ends.callback(sinks.finish, summary.as_dict())  # it may store the model that the link leads to
                ends.callback(_on_main(engine, link_model, run))
                ends.callback(session.saves.close)  # the save under way may be the one that moves the links
                ends.callback(_on_main(engine, partial(_write_summary, summary), run / "summary.json"))


def _write_summary(summary: RunSummary, path: Path) -> None:
    """Write summary.json. A full disk is a warning: it must not hide how the run ended."""
    try:
        summary.write(path)
    except OSError as error:
        logging.getLogger("llmtrain.run").warning("%s cannot be written (%s)", path, error.strerror)


def _on_main(engine: Engine, function: Callable[[Path], object], path: Path) -> Callable[[], None]:
    def call() -> None:
        if engine.is_main:
            function(path)

    return call


def _open_store(job: Job, run: Path, *, saved: Callable[..., None]) -> CheckpointStore | None:
    group = job.engine.save_group()
    if job.resumed_from is not None:
        job.engine.gather(None)  # every rank has read the checkpoint, which may now change its name
    if group is None:
        return None
    return CheckpointStore(
        run / "checkpoints",
        keep_last=job.config.trainer.keep_last,
        config_yaml=to_yaml(job.config),
        write_model=job.trained.write,
        saved=saved,
        resumed_from=job.resumed_from,
        group=group,
        split=job.trained.split,
    )


def _reporter(job: Job, outputs: Outputs, monitor: MachineMonitor) -> Reporter:
    config, engine, data = job.config, job.engine, job.data.training
    flops_per_token = job.trained.module.flops_per_token(config.data.seq_len)
    peak_flops = device_peak_flops(engine.device, precision=engine.resolved.precision)
    if peak_flops is not None and engine.resolved.float8:
        peak_flops *= flops_per_token / flops_as_bf16(job.trained.module, flops_per_token)

    def machine() -> dict[str, float]:
        ranks = {"rank": engine.rank, "world_size": engine.world_size}
        return metrics_of_all_ranks(monitor.take(), **ranks, sum_floats=engine.sum_floats)

    return Reporter(
        outputs,
        compute=Compute(
            num_devices=engine.world_size,
            flops_per_token=flops_per_token,
            peak_flops=peak_flops,
            compiles=engine.resolved.compile,
            spent=job.state.spent,
        ),
        batches=BatchLog(config.logging.log_batches, own_items=data.own_items, total_steps=job.schedule.total_steps),
        data=data,
        machine=machine,
        advice=_advice(config),
        watchdog=engine.watchdog,
        slow_steps=_slow_steps(engine),
    )


def _slow_steps(engine: Engine) -> SlowSteps:
    """Every rank watches its own steps: the log of each says what slows its machine down."""
    on_cpu, processes = engine.device.type == "cpu", engine.local_world_size
    threads = torch.get_num_threads() if on_cpu else 1
    needs = Needs(cores=len(allowed_cores()), processes=processes, threads=threads, on_cpu=on_cpu)
    return SlowSteps(MachineCounters(num_processes=processes), needs=needs)


def _advice(config: Config) -> dict[Activity, str]:
    """Return what to change when training waits too long."""
    workers, save = config.data.num_workers, config.trainer
    often = [
        f"trainer.{key} (now {value})"
        for key, value in (("save_every_steps", save.save_every_steps), ("save_every_seconds", save.save_every_seconds))
        if value is not None
    ]
    return {
        "data": f"raise data.num_workers (now {workers}), or move the data to a faster disk",
        "saving": f"raise {' or '.join(often) or 'the time between two saves'}, or save to a faster disk",
    }


def describe(job: Job, run: Path) -> None:
    """Log what the run is made of."""
    config, resolved, schedule, engine = job.config, job.engine.resolved, job.schedule, job.engine
    size, items_per_epoch = ParameterCount.of(job.trained.module), job.data.training.items_per_epoch
    processes = counted(engine.world_size, "process") + (f" ({resolved.strategy})" if engine.world_size > 1 else "")
    if resolved.because and engine.world_size > 1:
        _log("device", "%s: %s", resolved.strategy, resolved.because)
    compiled = "compiled (the first step takes a minute)" if resolved.compile else "not compiled"
    _log("run", "%s", run)
    precision = "fp8-mixed" if resolved.float8 else resolved.precision
    _log("device", "%s, %s, %s, %s", engine.device, precision, compiled, processes)
    _log("data", "%s of %d tokens an epoch", counted(items_per_epoch, "sequence"), config.data.seq_len)
    _describe_mixture(job)
    batch, micro = counted(schedule.batch_size, "sequence"), config.trainer.micro_batch_size
    _log("data", "%s a batch, micro-batches of %d", batch, micro)
    asked = global_batch_size(config.trainer, world_size=engine.data_parallel_size)
    if schedule.batch_size < asked:
        what = "packs of rows" if isinstance(config.data, ChatConfig) and config.data.packing else "rows"
        logging.getLogger("llmtrain.data").warning(
            "data.train has fewer %s (%d) than a batch of %d (trainer.micro_batch_size, trainer.grad_accum_steps and "
            "processes): each step takes all of them once",
            what,
            items_per_epoch,
            asked,
        )
    source = job.data.training.name
    logging.getLogger("llmtrain.data").debug("%d data workers, train from %s", config.data.num_workers, source)
    _log("model", "%s parameters, %s trainable", f"{size.total:,}", f"{size.trainable:,}")
    _describe_schedule(config, schedule, epochs=schedule.end_item / items_per_epoch)
    for why in job.position.passed_over:
        logging.getLogger("llmtrain.resume").warning("passing over a damaged checkpoint: %s", why)
    if job.start.origin:
        _log("resume", "going on from step %d, sequence %d of the data order", job.state.step, job.state.item)
        if changes := _changes(job.position.saved.get("planned", {}), job.planned()):
            logging.getLogger("llmtrain.resume").warning("going on otherwise than before: %s", changes)


def _describe_mixture(job: Job) -> None:
    """Log the sources of a mixture, and where its shares change during the run."""
    data, mixture, schedule = job.config.data, job.data.training.mixture, job.schedule
    if isinstance(data, TokensConfig | ChatConfig):
        for path in left_out_paths(data.train, data.mixture):
            _log("data", "%s is left out: its weight is 0", path)
    if mixture is None:
        return
    for name, share in zip(mixture.spec.names, mixture.stage_shares(0), strict=True):
        _log("data", "%s: %s of the sequences", name, f"{share:.2%}")
    for change in mixture.changes:
        where = f"sequence {change.item:,}" + (
            "" if change.item < schedule.end_item else ", at the end of the run or later"
        )
        _log("data", "%s: %s", where, change_in_words(change, mixture))
    if mixture.spec.weights is None and mixture.end is not None and schedule.end_item < mixture.end:
        logging.getLogger("llmtrain.data").warning(
            "the run ends after %s sequences, before each source was used as often as its epochs say (%s sequences): "
            "raise the limit in trainer, or remove it",
            f"{schedule.end_item:,}",
            f"{mixture.end:,}",
        )


def _describe_schedule(config: Config, schedule: Schedule, *, epochs: float) -> None:
    """Log the learning rate and the length; warn where a run is too short for what the config says."""
    scheduler, peak, log = config.scheduler, config.optimizer.lr, logging.getLogger("llmtrain.schedule")
    total_steps, warmup = schedule.total_steps, schedule.warmup_steps
    reached = peak * highest_scale(scheduler, total_steps=total_steps, warmup=warmup)
    shown = reached if (is_short := reached < 0.9 * peak) else peak
    _log("optimizer", "%s, peak learning rate %.4g", config.optimizer.name, shown)
    _log("schedule", "%s, %s (%.2f epochs), warm-up %d", scheduler.name, counted(total_steps, "step"), epochs, warmup)
    if warmup != (anew := warmup_steps(scheduler, total_steps=total_steps)):
        log.info("warm-up keeps the %d steps that the run began with; a new run of this length takes %d", warmup, anew)
    elif scheduler.warmup_steps is not None and warmup < scheduler.warmup_steps:
        message = "scheduler.warmup_steps is %d, but the run has %s: warm-up takes %d, a quarter of them"
        log.warning(message, scheduler.warmup_steps, counted(total_steps, "step"), warmup)
    if is_short:
        message = "a run of %s never reaches optimizer.lr, %g: its highest learning rate is %.3g"
        log.warning(message, counted(total_steps, "step"), peak, reached)


def _changes(before: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Return in words what differs between two plans of a run."""
    words = {
        "batch_size": "%d sequences a batch (%d before)",
        "total_steps": "%d steps in all (%d before)",
        "next_learning_rate": "learning rate %.3g at the next step (%.3g before)",
    }
    found = [(words[name], now[name], value) for name, value in before.items() if name in words]
    return ", ".join(text % (new, old) for text, new, old in found if not math.isclose(new, old, rel_tol=1e-6))


def _log(stage: str, message: str, *values: object) -> None:
    logging.getLogger(f"llmtrain.{stage}").info(message, *values)
