"""`train`, top to bottom: config → machine → data → model → optimizer → loop → summary.

A run that is resumed goes the same way; only its config, its position and its tensors come from a checkpoint.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from llmtrain.config.errors import ConfigError, Preempted
from llmtrain.config.load import LoadedConfig, load_config, to_yaml
from llmtrain.config.running import OutputConfig
from llmtrain.config.schema import Config
from llmtrain.contracts import Batch
from llmtrain.data.tokens import TokenData, ValidationData, open_training_data, open_validation_data
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.folder import read_state_dict, write_model_folder
from llmtrain.recipes.prepare import ensure_shards
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.sink_group import start_sinks
from llmtrain.tracking.summary import ParameterCount
from llmtrain.tracking.system import device_peak_flops, peak_memory_bytes
from llmtrain.training.checkpoint import CheckpointStore, Snapshot, load_optimizer, load_state
from llmtrain.training.loop import fit
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.plan import Schedule, make_schedule
from llmtrain.training.report import Reporter
from llmtrain.training.resume import Identity, Origin, checkpoint_of, find_origin, identity_of, refuse_another_run
from llmtrain.training.runs import link_model, locked, start_run
from llmtrain.training.signals import StopRequested, StopSignal
from llmtrain.training.state import RunState, seed_step

DRY_RUN_STEPS = 5


def train(
    loaded: LoadedConfig | None, *, resume: str | None = None, overrides: Sequence[str] = (), dry_run: bool = False
) -> dict[str, Any]:
    """Train what `loaded` describes, or go on with the run that `resume` names; returns the summary.

    Without `loaded` the run's own config is used, with `overrides`. `dry_run` computes five forward steps and writes
    nothing. Raises Preempted after a stop signal, WillFailAgain at a loss that is no number, ConfigError at a mistake.
    """
    with StopSignal() as stop:
        try:
            with stop.interrupts():
                job = set_up(loaded, resume=resume, overrides=overrides)
        except StopRequested:
            raise Preempted("stopped before the first step: nothing is lost, start it again") from None
        try:
            return _dry_run(job) if dry_run else _run(job, stop)
        finally:
            job.engine.close()


@dataclass
class Job:
    """All that a run is made of, before anything of it is written."""

    config: Config
    engine: Engine
    data: TokenData
    validation: ValidationData | None
    identity: Identity
    decoder: Decoder
    model: nn.Module
    """The decoder as the engine wraps it: this is what is called."""
    optimizer: NamedOptimizer
    schedule: Schedule
    state: RunState
    origin: Origin | None
    passed_over: list[str]
    """What is wrong with each checkpoint that is newer than the one that the run goes on from."""


def set_up(loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str] = ()) -> Job:
    """Build a job from a config or a checkpoint. What can be refused is refused here, before anything is written."""
    config, origin = _config_and_origin(loaded, resume=resume, overrides=overrides)
    setup_logging(config.logging, run_folder=None, rank=0)
    resolved = resolve(config.run, config.trainer, config.distributed, previous=origin.resolved if origin else None)
    engine = Engine(resolved, distributed=config.distributed, deterministic=config.run.deterministic)
    setup_logging(config.logging, run_folder=None, rank=engine.rank)

    with engine.main_first():
        ensure_shards(config)
    data = open_training_data(config.data, seed=config.run.seed, rank=engine.rank, world_size=engine.world_size)
    validation = open_validation_data(config.data, seed=config.run.seed, training=data)
    vocab_size = _vocab_size(config.model.vocab_size, needed=data.facts.vocab_size)
    identity = identity_of(
        config.model,
        vocab_size=vocab_size,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        fingerprint=data.fingerprint,
    )

    checkpoint, passed_over = engine.from_main(lambda: checkpoint_of(origin) if origin else (None, []))
    state = RunState()
    if checkpoint:
        saved = load_state(checkpoint)
        refuse_another_run(saved["identity"], identity, where=checkpoint)
        state = RunState.from_dict(saved["position"])
    schedule = make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        items_per_epoch=data.items_per_epoch,
        state=state,
        world_size=engine.world_size,
    )

    seed_step(config.run.seed, -1, rank=0)  # every rank builds the same weights
    decoder = Decoder(config.model, vocab_size)
    if checkpoint:
        decoder.load_state_dict(read_state_dict(checkpoint / "model", config.model))
    if resolved.compile:
        decoder.compile_parts()
    model = engine.setup(decoder)
    optimizer = build_optimizer(config.optimizer, decoder)
    if checkpoint:
        optimizer.load_state_tensors(load_optimizer(checkpoint))
    return Job(
        config, engine, data, validation, identity, decoder, model, optimizer, schedule, state, origin, passed_over
    )


def _run(job: Job, stop: StopSignal) -> dict[str, Any]:
    run = job.engine.from_main(lambda: _run_folder(job))
    with locked(run) if job.engine.is_main else nullcontext():
        return _train_in(run, job, stop)


def _train_in(run: Path, job: Job, stop: StopSignal) -> dict[str, Any]:
    config, engine, state = job.config, job.engine, job.state
    resumed_step = state.step if job.origin else None
    if engine.is_main:  # under the lock: a second process that would go on with this run changes nothing of it
        (run / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    setup_logging(config.logging, run_folder=run, rank=engine.rank)
    _describe(job, run)
    sinks = start_sinks(
        config.tracking,
        run=run,
        config=config.model_dump(mode="json"),
        resumed_step=resumed_step,
        is_main=engine.is_main,
    )
    store = _open_store(job, run, resumed_step=resumed_step) if engine.is_main else None
    outcome: Literal["finished", "preempted", "failed"] = "failed"
    plain = True if config.logging.json_output else None
    with Progress(job.schedule.total_steps, start_step=state.step, plain=plain, quiet=not engine.is_main) as progress:
        report = Reporter(
            sinks=sinks,
            progress=progress,
            items_per_epoch=job.data.items_per_epoch,
            flops_per_token=job.decoder.flops_per_token(config.data.seq_len),
            peak_flops=device_peak_flops(engine.device, precision=engine.resolved.precision),
            num_devices=engine.world_size,
            log_batches=config.logging.log_batches,
            total_steps=job.schedule.total_steps,
        )
        try:
            with closing(_training_batches(job)) as batches:
                finished = fit(
                    model=job.model,
                    optimizer=job.optimizer,
                    batches=batches,
                    evaluate=partial(_evaluate, job, stop) if job.validation else None,
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
        finally:
            summary = report.summary(
                state,
                outcome,
                parameters=ParameterCount.of(job.decoder),
                peak_memory_bytes=peak_memory_bytes(engine.device),
                resumed_step=resumed_step,
            )
            sinks.finish(summary.as_dict())
            if store:
                summary.write(run / "summary.json")
                try:
                    store.close()  # the save under way may be the one that moves the links
                finally:
                    link_model(run)
    if outcome == "preempted":
        raise Preempted(f"step {state.step} is saved; to go on: llmtrain train --resume {run}")
    validation = {name.replace("/", "_"): value for name, value in state.validation.items()}
    return {"run": str(run), "model": str(run / "model"), **summary.as_dict(), **validation}


def _dry_run(job: Job) -> dict[str, Any]:
    """Five forward steps: the data can be read, the model built, and a batch fits in memory."""
    losses = []
    with closing(_training_batches(job)) as batches:
        for step, micro_batches in enumerate(islice(batches, DRY_RUN_STEPS), start=1):
            result = evaluate_loss(job.model, micro_batches, engine=job.engine, tokens_per_byte=None)
            losses.append(result.loss)
            _log("train", "dry run %d/%d: loss %.4f, %d tokens", step, DRY_RUN_STEPS, result.loss, result.num_tokens)
    return {"dry_run": True, "losses": losses, "planned_steps": job.schedule.total_steps}


# -- what the set-up needs ---------------------------------------------------------------------------------------------


def _config_and_origin(
    loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str]
) -> tuple[Config, Origin | None]:
    if resume is None:
        if loaded is None:
            raise ConfigError("train needs a CONFIG, or --resume to go on with a run")
        return loaded.config, None
    if loaded is not None:
        return loaded.config, find_origin(resume, Path(loaded.config.output.root_dir))
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    origin = find_origin(resume, Path(given.get("output.root_dir", OutputConfig().root_dir)))
    return load_config(str(origin.run / "config.yaml"), overrides).config, origin


def _vocab_size(wanted: int | None, *, needed: int) -> int:
    if wanted is not None and wanted < needed:
        raise ConfigError(
            f"model.vocab_size is {wanted}, but the tokenizer has {needed} tokens: remove the key, or make it {needed} "
            "or more"
        )
    return wanted or needed


def _run_folder(job: Job) -> Path:
    resolved = job.engine.resolved.as_dict()
    return job.origin.run if job.origin else start_run(job.config.run, job.config.output, resolved=resolved)


# -- what the loop is handed -------------------------------------------------------------------------------------------


def _training_batches(job: Job) -> Generator[list[Batch], None, None]:
    return job.data.batches(
        start_item=job.state.item,
        batch_size=job.schedule.batch_size,
        end_item=job.schedule.end_item,
        micro_batch_size=job.config.trainer.micro_batch_size,
    )


def _evaluate(job: Job, stop: StopSignal) -> dict[str, float]:
    """The validation figures by their names. Several ranks agree before each batch whether to stop."""

    def agree_to_go_on() -> None:
        if job.engine.world_size > 1 and job.engine.sum(int(stop.requested))[0]:
            raise StopRequested

    assert job.validation is not None
    eval_steps = job.config.trainer.eval_steps
    batches = job.validation.evaluation_batches(
        batch_size=job.config.trainer.micro_batch_size,
        max_batches=eval_steps and eval_steps * job.engine.world_size,
        rank=job.engine.rank,
        world_size=job.engine.world_size,
    )
    with closing(batches):
        tokens_per_byte = job.validation.facts.tokens_per_byte
        return evaluate_loss(
            job.model, batches, engine=job.engine, tokens_per_byte=tokens_per_byte, before_batch=agree_to_go_on
        ).figures()


def _save(job: Job, store: CheckpointStore | None, state: RunState, best: bool) -> None:
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
        step=state.step, state=saved, model=job.decoder.state_dict(), optimizer=job.optimizer.state_tensors()
    )
    store.save(snapshot, best=best, final=state.step >= job.schedule.total_steps)


def _open_store(job: Job, run: Path, *, resumed_step: int | None) -> CheckpointStore:
    def write_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
        write_model_folder(
            folder,
            config=job.config.model,
            vocab_size=job.decoder.vocab_size,
            state_dict=weights,
            tokenizer_folder=job.data.facts.tokenizer,
            eos_id=job.data.facts.eos_id,
        )

    return CheckpointStore(
        run / "checkpoints",
        keep_last=job.config.trainer.keep_last,
        config_yaml=to_yaml(job.config),
        write_model=write_model,
        resumed_step=resumed_step,
    )


# -- what people are told ----------------------------------------------------------------------------------------------


def _describe(job: Job, run: Path) -> None:
    config, resolved, schedule, size = job.config, job.engine.resolved, job.schedule, ParameterCount.of(job.decoder)
    processes = f"{job.engine.world_size} processes ({resolved.strategy})" if job.engine.world_size > 1 else "1 process"
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


def _log(stage: str, message: str, *values: object) -> None:
    logging.getLogger(f"llmtrain.{stage}").info(message, *values)
