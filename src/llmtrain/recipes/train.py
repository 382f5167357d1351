"""`train`, top to bottom: set up the job → make or find its run folder → sinks, store, loop → summary.

A run that is resumed goes the same way; only its config, its position and its tensors come from a checkpoint. What a
job is made of is in `job`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import closing, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from llmtrain.config.errors import Hang, Preempted, WillFailAgain
from llmtrain.config.load import LoadedConfig, to_yaml
from llmtrain.config.schema import Config
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import abandon_groups, is_lost_peer, is_timeout
from llmtrain.distributed.gang import Gang
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.recipes.report import REPORT_NAME, report_at_end
from llmtrain.recipes.run.job import Job, set_up
from llmtrain.recipes.run.out_of_memory import out_of_memory
from llmtrain.tracking.events import EVENTS_NAME, EventLog
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.machine import MachineMonitor, figures_of_all
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.sink_group import start_sinks
from llmtrain.tracking.summary import ParameterCount
from llmtrain.tracking.system import device_peak_flops, peak_memory_bytes
from llmtrain.tracking.times import Activity
from llmtrain.training.attempts import count_restart, forget_restarts, refuse_crash_loop
from llmtrain.training.cadence import Due
from llmtrain.training.checkpoint import CheckpointStore, Snapshot
from llmtrain.training.loop import fit
from llmtrain.training.non_finite import NonFinite, RollBack
from llmtrain.training.out_of_memory import is_out_of_memory
from llmtrain.training.report import Reporter
from llmtrain.training.runs import link_model, locked, start_run
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState

DRY_RUN_STEPS = 5
MAX_ROWS_NAMED = 20


def train(
    loaded: LoadedConfig | None, *, resume: str | None = None, overrides: Sequence[str] = (), dry_run: bool = False
) -> dict[str, Any]:
    """Train what `loaded` describes, or go on with the run that `resume` names; returns the summary.

    Without `loaded` the run's own config is used, with `overrides`. `dry_run` computes five forward steps and writes
    nothing. Raises Preempted after a stop signal or when another process is gone, Hang when it does not answer,
    WillFailAgain at a loss that is no number, ConfigError at a mistake, RunError where the config wants the model
    published and that failed.
    """
    job: Job | None = None
    with StopSignal() as stop:
        try:
            try:
                with stop.interrupts():
                    job = set_up(loaded, resume=resume, overrides=overrides)
            except StopRequested:
                raise Preempted("stopped before the first step: nothing is lost, start it again") from None
            if dry_run:
                return _dry_run(job)
            if job.config.publish is not None:
                job.engine.from_main(partial(_may_publish, job))
            summary = _run(job, stop)
        except (RuntimeError, MemoryError, OSError) as error:
            if is_out_of_memory(error):  # in a step `_run` says more
                why = str(error).splitlines()[0] if str(error) else "MemoryError"
                raise WillFailAgain(f"out of memory before the first step ({why}): see `llmtrain plan`") from error
            if not is_lost_peer(error):
                raise
            abandon_groups()
            if job:
                job.engine.watchdog.peer_lost(error)
            why = str(error).splitlines()[0]
            if is_timeout(error):
                raise Hang(f"another process of the run does not answer ({why}): resume it") from error
            raise Preempted(f"another process of the run is gone ({why}): resume it") from error
        finally:
            if job:
                job.engine.close()
    config, is_main = job.config, job.engine.is_main
    del job  # the memory of what was trained, for the model that is loaded again
    if config.publish is None or not is_main:
        return summary
    from llmtrain.recipes.run.publish_trained import publish_trained

    return {**summary, "published": publish_trained(config, Path(summary["run"]))["to"]}


def _may_publish(job: Job) -> None:
    from llmtrain.recipes.run.publish_trained import check_publishing

    check_publishing(job.config, run_id=job.origin.run.name if job.origin else job.config.output.run_id or "a new run")


def _run(job: Job, stop: StopSignal) -> dict[str, Any]:
    config, engine = job.config, job.engine
    run = engine.from_main(lambda: job.origin.run if job.origin else _new_run(job))
    with locked(run) if engine.is_main else nullcontext():
        if job.origin:
            refuse_crash_loop(engine.from_main(lambda: count_restart(run, checkpoint=job.checkpoint)))
        if engine.is_main:  # under the lock: a second process that would go on with this run changes nothing of it
            (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        setup_logging(config.logging, run_folder=run, rank=engine.rank)
        _describe(job, run)
        while True:
            try:
                return _train_in(run, job, stop)
            except RollBack as request:
                job.take_back(run, request.found)
            except NonFinite as error:
                logging.getLogger("llmtrain.train").error("%s", error.found)  # the message itself is for the terminal
                rows = job.rows_of(error.found.items)
                if not rows:
                    raise
                more = f" and {len(rows) - MAX_ROWS_NAMED} more" if len(rows) > MAX_ROWS_NAMED else ""
                raise WillFailAgain(f"{error}. Its rows: {', '.join(rows[:MAX_ROWS_NAMED])}{more}") from error
            except (RuntimeError, MemoryError, OSError) as error:
                if not is_out_of_memory(error):
                    raise
                raise out_of_memory(job, error, run=run) from error


def _new_run(job: Job) -> Path:
    about = job.config.run
    return start_run(about, job.config.output, resolved=job.engine.resolved.as_dict(), as_written=job.as_written)


def _train_in(run: Path, job: Job, stop: StopSignal) -> dict[str, Any]:
    """Train from where the job stands until it is over, stopped, or to be taken back (RollBack)."""
    config, engine, state = job.config, job.engine, job.state
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
    gang = engine.gang()
    store = _open_store(job, run, gang) if gang else None
    outcome: Literal["finished", "preempted", "failed"] = "failed"
    with (
        MachineMonitor(run=run, device=engine.device, interval_sec=config.tracking.system_interval_sec) as monitor,
        Progress(job.schedule.total_steps, start_step=state.step, quiet=not engine.is_main) as progress,
    ):
        report = Reporter(
            sinks=sinks,
            events=events,
            progress=progress,
            items_per_epoch=job.data.items_per_epoch,
            flops_per_token=job.trained.module.flops_per_token(config.data.seq_len),
            peak_flops=device_peak_flops(engine.device, precision=engine.resolved.precision),
            num_devices=engine.world_size,
            log_batches=config.logging.log_batches,
            own_items=job.data.own_items,
            total_steps=job.schedule.total_steps,
            machine=partial(_machine, job, monitor),
            advice=_advice(config),
            watchdog=engine.watchdog,
        )
        try:
            if state.step == 0 and config.trainer.non_finite == "rollback":
                _save(job, store, state, False, False)  # there is always something to go back to
            with closing(_training_batches(job)) as batches, engine.watchdog.over(run / "logs"):
                finished = fit(
                    model=job.model,
                    optimizer=job.optimizer,
                    batches=batches,
                    evaluate=partial(_evaluate, job, run, stop),
                    save=partial(_save, job, store),
                    schedule=job.schedule,
                    state=state,
                    engine=engine,
                    stop=stop,
                    report=report,
                )
            if store:
                with report.spent("saving"):
                    store.wait()
            outcome = "finished" if finished else "preempted"
            if not finished:
                events.add("stopped", step=state.step)
            if engine.is_main:
                forget_restarts(run)
        finally:
            summary = report.summary(
                state,
                outcome,
                parameters=ParameterCount.of(job.trained.module),
                peak_memory_bytes=peak_memory_bytes(engine.device),
                resumed_step=job.resumed_step,
            )
            try:
                if engine.is_main:
                    summary.write(run / "summary.json")
                try:
                    if store:
                        store.close()  # the save under way may be the one that moves the links
                finally:
                    if engine.is_main:
                        link_model(run)
            finally:
                sinks.finish(summary.as_dict())  # last: it may store the model that the link leads to
            if engine.is_main:
                report_at_end(run)
    if outcome == "preempted":
        raise Preempted(f"step {state.step} is saved; to go on: llmtrain train --resume {run}")
    validation = {name.replace("/", "_"): value for name, value in state.validation.items()}
    report_page = str(run / REPORT_NAME) if (run / REPORT_NAME).is_file() else None
    return {"run": str(run), "model": str(run / "model"), "report": report_page, **summary.as_dict(), **validation}


def _dry_run(job: Job) -> dict[str, Any]:
    """Five forward steps: the data can be read, the model built, and a batch fits in memory."""
    losses = []
    with closing(_training_batches(job)) as batches:
        for step, micro_batches in enumerate(islice(batches, DRY_RUN_STEPS), start=1):
            result = evaluate_loss(job.model, micro_batches, engine=job.engine, tokens_per_byte=None)
            losses.append(result.loss)
            _log("train", "dry run %d/%d: loss %.4f, %d tokens", step, DRY_RUN_STEPS, result.loss, result.num_tokens)
    return {"dry_run": True, "losses": losses, "planned_steps": job.schedule.total_steps}


# -- what the loop is handed -------------------------------------------------------------------------------------------


def _training_batches(job: Job) -> Generator[list[Batch], None, None]:
    return job.data.batches(
        start_item=job.state.item,
        batch_size=job.schedule.batch_size,
        end_item=job.schedule.end_item,
        micro_batch_size=job.config.trainer.micro_batch_size,
    )


def _evaluate(job: Job, run: Path, stop: StopSignal, due: Due) -> dict[str, float]:
    """The figures that are due by their names. Several ranks agree before each batch whether to stop."""

    def agree_to_go_on() -> None:
        if job.engine.world_size > 1 and job.engine.sum(int(stop.requested))[0]:
            raise StopRequested

    figures = _validate(job, before_batch=agree_to_go_on) if due.validation else {}
    if due.questions and job.interview:
        figures |= job.interview.figures(job.interview.hold(before_batch=agree_to_go_on))
    if due.validation and job.samples:
        job.samples.write(run, step=job.state.step)
    return figures


def _validate(job: Job, *, before_batch: Callable[[], None]) -> dict[str, float]:
    assert job.validation is not None
    eval_steps = job.config.trainer.eval_steps
    batches = job.validation.evaluation_batches(
        batch_size=job.config.trainer.micro_batch_size,
        max_batches=eval_steps and eval_steps * job.engine.dp_size,
        rank=job.engine.dp_rank,
        world_size=job.engine.dp_size,
    )
    with closing(batches):
        tokens_per_byte = job.validation.facts.tokens_per_byte
        return evaluate_loss(
            job.model, batches, engine=job.engine, tokens_per_byte=tokens_per_byte, before_batch=before_batch
        ).figures()


def _save(job: Job, store: CheckpointStore | None, state: RunState, best: bool, final: bool) -> None:
    if store is None:
        return
    saved = {
        "position": state.as_dict(),
        "identity": job.identity,
        "resolved": job.engine.resolved.as_dict(),
        "world_size": job.engine.world_size,
        "learning_rate": job.optimizer.lr,
        "random_numbers": {"seed": job.config.run.seed, "drawn_from": ["seed", "step", "rank"]},
    }
    snapshot = Snapshot(
        step=state.step, state=saved, model=job.trained.tensors(), optimizer=job.optimizer.state_tensors()
    )
    store.save(snapshot, best=best, final=final)


def _open_store(job: Job, run: Path, gang: Gang) -> CheckpointStore:
    return CheckpointStore(
        run / "checkpoints",
        keep_last=job.config.trainer.keep_last,
        config_yaml=to_yaml(job.config),
        write_model=job.trained.write,
        resumed_step=job.resumed_step,
        gang=gang,
        split=job.trained.split,
    )


def _machine(job: Job, monitor: MachineMonitor) -> dict[str, float]:
    engine = job.engine
    return figures_of_all(monitor.take(), rank=engine.rank, world_size=engine.world_size, sum_floats=engine.sum_floats)


# -- what people are told ----------------------------------------------------------------------------------------------


def _describe(job: Job, run: Path) -> None:
    config, resolved, schedule, size = (
        job.config,
        job.engine.resolved,
        job.schedule,
        ParameterCount.of(job.trained.module),
    )
    processes = f"{job.engine.world_size} processes ({resolved.strategy})" if job.engine.world_size > 1 else "1 process"
    if resolved.because and job.engine.world_size > 1:
        _log("device", "%s: %s", resolved.strategy, resolved.because)
    compiled = "compiled (the first step takes a minute)" if resolved.compile else "not compiled"
    epochs = schedule.end_item / job.data.items_per_epoch
    _log("run", "%s", run)
    _log("device", "%s, %s, %s, %s", job.engine.device, resolved.precision, compiled, processes)
    _log("data", "%s items of %d tokens an epoch", f"{job.data.items_per_epoch:,}", config.data.seq_len)
    _log("data", "%d items a batch, micro-batches of %d", schedule.batch_size, config.trainer.micro_batch_size)
    logging.getLogger("llmtrain.data").debug("%d data workers, train from %s", config.data.num_workers, job.data.name)
    _log("model", "%s parameters, %s trainable", f"{size.total:,}", f"{size.trainable:,}")
    _log("optimizer", "%s, peak learning rate %g", config.optimizer.name, config.optimizer.lr)
    _log("schedule", "%s, %d steps (%.2f epochs)", config.scheduler.name, schedule.total_steps, epochs)
    for why in job.passed_over:
        logging.getLogger("llmtrain.resume").warning("passing over a damaged checkpoint: %s", why)
    if job.origin:
        _log("resume", "going on from step %d, item %d", job.state.step, job.state.item)


def _advice(config: Config) -> dict[Activity, str]:
    """What to change when training waits too long."""
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


def _log(stage: str, message: str, *values: object) -> None:
    logging.getLogger(f"llmtrain.{stage}").info(message, *values)
