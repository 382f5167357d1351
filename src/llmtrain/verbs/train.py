"""`train`, top to bottom: set up the job → make or find its run folder → sinks, checkpoints, loop → summary.

A resumed run goes the same way: only its config, its position and its tensors come from a checkpoint.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from llmtrain.config.loading.load import LoadedConfig, to_yaml
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.strategy import Choice
from llmtrain.planning.memory_choices import make_memory_choices
from llmtrain.planning.out_of_memory import out_of_memory_explained
from llmtrain.runs.attempts import count_restart, refuse_crash_loop
from llmtrain.runs.folders import begin_run
from llmtrain.runs.upload import locked_and_uploaded
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.system import peak_memory_bytes
from llmtrain.training.failures import Failures, before_first_step, removed_if_rejected
from llmtrain.training.job import Job
from llmtrain.training.loop import fit
from llmtrain.training.non_finite import NonFinite, RollBack
from llmtrain.training.session import already_finished, describe, open_session, result_of
from llmtrain.training.setup.build import build_learner, build_model, identity_of_run, schedule_of
from llmtrain.training.setup.data import as_recorded, fetch_folders, open_data
from llmtrain.training.setup.observers import open_answers, open_samples
from llmtrain.training.setup.start import Start, at_commits, find_position, find_start, open_engine
from llmtrain.training.signals import StopSignal
from llmtrain.training.stages import fix_stages
from llmtrain.training.time_limit import SpeedCheck, fix_number_of_steps


def train(
    loaded: LoadedConfig | None,
    *,
    resume: str | None = None,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    check_speed: SpeedCheck | None = None,
) -> dict[str, Any]:
    """Train what `loaded` describes, or go on with the run that `resume` names; returns the summary.

    Without `loaded` the run's own config is used, with `overrides`. `dry_run` computes five forward steps and writes
    nothing. `check_speed` may reject what trainer.max_minutes found. Raises ConfigError at a mistake, Preempted after
    a stop, Hang if a process does not answer, WillFailAgain if the loss is no number, RunError if publishing fails.
    """
    began = time.monotonic()
    with StopSignal() as stop, Failures() as failures:
        with before_first_step(stop):
            start = find_start(loaded, resume=resume, overrides=overrides)
            engine = open_engine(start, choose_strategy=_choose_strategy)
            failures.engine = engine
            job = set_up(at_commits(start, engine), engine)
            make_memory_choices(job)
            fix_number_of_steps(job, began=began, check=check_speed)
            fix_stages(job)
        if dry_run:
            return job.dry_run()
        if job.config.publish is not None:
            from llmtrain.verbs.publish import check_publishing

            engine.from_main(partial(check_publishing, job.config, run_id=job.run_id or "a new run"))
        summary, config = engine.from_main(partial(already_finished, job)) or _run(job, stop), job.config
        del job  # the memory of what was trained, for the model that is loaded again
    if config.publish is None or not engine.is_main:
        return summary
    from llmtrain.verbs.publish import publish_trained

    return {**summary, "published": publish_trained(config, Path(summary["run"]))["to"]}


def set_up(start: Start, engine: Engine) -> Job:
    """Build a job. What can be rejected is rejected here, before anything is written."""
    folders = fetch_folders(start.config, engine)
    config = as_recorded(start.config, folders)
    data = open_data(config, engine, folders)
    process_bytes = peak_memory_bytes()
    trained = build_model(config, engine, data, folders)
    identity = identity_of_run(config, data, trained)
    position = find_position(start, identity, engine)
    job = Job(
        config=config,
        start=start,
        data=data,
        trained=trained,
        learner=build_learner(config, engine, trained),
        identity=identity,
        schedule=schedule_of(config, data, position.state, engine),
        position=position,
        answers=open_answers(config, engine, trained, folders, data),
        process_bytes=process_bytes,
    )
    job.load_or_initialize()
    job.samples = open_samples(config, engine, trained, folders, data)
    return job


def _choose_strategy(config: Config, **limits: Any) -> Choice:
    from llmtrain.planning.auto_strategy import strategy_for  # here: only several processes need it

    return strategy_for(config, **limits)


def _run(job: Job, stop: StopSignal) -> dict[str, Any]:
    """Train in the run's folder until it is over; go back to a checkpoint where the loop asks for it."""
    config, engine, origin = job.config, job.engine, job.start.origin
    run = engine.from_main(job.find_or_make_folder)
    with locked_and_uploaded(run, config.trainer.keep_last, is_main=engine.is_main), removed_if_rejected(run, job):
        if origin:
            refuse_crash_loop(engine.from_main(lambda: count_restart(run, checkpoint=job.position.checkpoint)))
        if engine.is_main:  # under the lock: a second process that would go on with this run changes nothing of it
            begin_run(run, to_yaml(config))
        setup_logging(config.logging, run_folder=run, rank=engine.rank)
        describe(job, run)
        while True:
            try:
                with out_of_memory_explained(job, run=run):
                    return _train_in(run, job, stop)
            except RollBack as request:
                job.roll_back(run, request.found)
            except NonFinite as error:
                raise job.with_rows(error) from None


def _train_in(run: Path, job: Job, stop: StopSignal) -> dict[str, Any]:
    """Train from where the job stands until it is over, stopped, or to be rolled back (RollBack)."""
    with open_session(run, job) as session:
        session.save_beginning()
        with closing(job.batches()) as batches, job.engine.watchdog.over(run / "logs"):
            finished = fit(
                job.learner,
                batches,
                schedule=job.schedule,
                state=job.state,
                evaluate=partial(job.evaluate, run, stop),
                save=session.save,
                stop=stop,
                report=session.report,
            )
        session.ended(run, finished=finished)
    return result_of(run, session.summary.as_dict(), job.state, finished=finished)
