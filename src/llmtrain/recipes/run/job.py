"""What a run is made of, built from a config or a checkpoint: config → machine → data → model → optimizer → schedule.

`train` runs it. What can be refused is refused here, before anything is written.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import nn

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.huggingface import HuggingFaceConfig
from llmtrain.config.load import LoadedConfig, load_config
from llmtrain.config.model import DecoderConfig
from llmtrain.config.running import OutputConfig
from llmtrain.config.schema import Config
from llmtrain.config.training import RendezvousConfig
from llmtrain.data.chat.data import ChatData, ChatValidation
from llmtrain.data.tokens import TokenData, ValidationData, open_training_data, open_validation_data
from llmtrain.distributed.asked import refuse_strategy
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.recipes.planning.planned import strategy_for
from llmtrain.recipes.prepare import ensure_shards
from llmtrain.recipes.run.interview import Interview, open_interview
from llmtrain.recipes.run.samples import Samples, samples_of
from llmtrain.recipes.run.trained import Trained, build_decoder, build_huggingface, with_model_found
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.sink_group import check_own_sinks
from llmtrain.tracking.system import peak_memory_bytes
from llmtrain.training.checkpoint import load_optimizer, load_state, newest_good
from llmtrain.training.non_finite import StepFigures, leave_out
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.plan import Schedule, make_schedule
from llmtrain.training.resume import (
    Identity,
    Origin,
    checkpoint_of,
    find_origin,
    find_origin_if_any,
    identity_of,
    refuse_another_run,
)
from llmtrain.training.state import LossScale, RunState, seed_step

log = logging.getLogger("llmtrain.train")

AUTO = "auto"
"""What `resume` may be instead of a run: go on with output.run_id if it was started already, else start it."""


@dataclass
class Job:
    """All that a run is made of, before anything of it is written."""

    config: Config
    engine: Engine
    data: TokenData | ChatData
    validation: ValidationData | ChatValidation | None
    identity: Identity
    trained: Trained
    interview: Interview | None
    """What it is asked now and then, if it is."""
    model: nn.Module
    """Its module as the engine wraps it: this is what is called."""
    optimizer: NamedOptimizer
    schedule: Schedule
    state: RunState
    origin: Origin | None
    resumed_step: int | None
    """The step that this process goes on from, if it does."""
    checkpoint: Path | None
    """Where this process started from."""
    passed_over: list[str]
    """What is wrong with each checkpoint that is newer than the one that the run goes on from."""
    process_bytes: int
    """Resident memory before there was a model."""
    samples: Samples | None
    """Lets the model write at evaluations, where the config asks for it."""
    as_written: str | None
    """The text of the config's file; None where a run goes on with its own."""

    def rows_of(self, items: range) -> list[str]:
        """`file:line` of the rows of some items, where items are made of rows."""
        if not isinstance(self.data, ChatData):
            return []
        return [source for item in items for source in self.data.sources_of(item)]

    def load_tensors(self, checkpoint: Path) -> None:
        """Take over the weights and the optimizer's state of a verified checkpoint."""
        self.trained.read(checkpoint / "model")
        self.optimizer.load_state_tensors(load_optimizer(checkpoint))

    def take_back(self, run: Path, found: StepFigures) -> None:
        """Go back to the newest good checkpoint of `run`, to go on from there without the items of the step `found`.

        Raises WillFailAgain if that was tried many times, CheckpointError if no checkpoint is good.
        """
        newest = self.engine.from_main(lambda: newest_good(run / "checkpoints"))
        assert newest is not None, "with non_finite: rollback there is a checkpoint from the start on"
        state = RunState.from_dict(load_state(newest[0])["position"])
        state.left_out = self.state.left_out
        leave_out(state, found)
        log.warning("%s. Back to step %d, to go on without these items", found, state.step)
        self.load_tensors(newest[0])
        self.state, self.resumed_step = state, state.step


def set_up(loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str] = ()) -> Job:
    """Build a job from a config or a checkpoint. What can be refused is refused here, before anything is written."""
    config, origin = _config_and_origin(loaded, resume=resume, overrides=overrides)
    config = with_model_found(config)
    setup_logging(config.logging, run_folder=None, rank=int(os.environ.get("RANK", "0")))
    check_own_sinks(config.tracking)
    resolved = resolve(
        config.run,
        config.trainer,
        config.distributed,
        previous=origin.resolved if origin else None,
        choose=partial(strategy_for, config),
    )
    refuse_strategy(config, strategy=resolved.strategy, world_size=int(os.environ.get("WORLD_SIZE", "1")))
    engine = Engine(resolved, distributed=config.distributed, deterministic=config.run.deterministic)
    setup_logging(config.logging, run_folder=None, rank=engine.rank)
    # Who a process is among the others belongs to this start, not to the run: a later one goes on alone, or with more.
    distributed = config.distributed.model_copy(update={"rendezvous": RendezvousConfig()})
    config = config.model_copy(update={"distributed": distributed})

    model_folder, tokenizer_folder = _fetch(config, engine)
    if isinstance(config.model, HuggingFaceConfig) and model_folder and Path(config.model.path).expanduser().is_dir():
        # What the run begins from must be found later too, when a link such as runs/latest leads elsewhere.
        begun_from = config.model.model_copy(update={"path": str(model_folder.resolve())})
        config = config.model_copy(update={"model": begun_from})
    data, validation, chat_template = _open_data(config, engine, tokenizer_folder=tokenizer_folder)
    process_bytes = peak_memory_bytes()
    seed_step(config.run.seed, -1, rank=0)  # every rank builds the same weights
    trained = _build(
        config,
        engine,
        data,
        model_folder=model_folder,
        tokenizer_folder=tokenizer_folder,
        chat_template=chat_template,
    )
    interview = open_interview(
        config, trained.module, tokenizer_folder=data.facts.tokenizer, model_folder=model_folder, engine=engine
    )
    identity = identity_of(
        trained.described, seed=config.run.seed, seq_len=config.data.seq_len, fingerprint=data.fingerprint
    )

    checkpoint, passed_over = engine.from_main(lambda: checkpoint_of(origin) if origin else (None, []))
    state = RunState()
    if checkpoint:
        saved = load_state(checkpoint)
        refuse_another_run(saved["identity"], identity, where=checkpoint)
        state = RunState.from_dict(saved["position"])
    if resolved.precision == "16-mixed":
        state.loss_scale = state.loss_scale or LossScale()
    schedule = make_schedule(
        config.trainer,
        config.scheduler,
        seed=config.run.seed,
        seq_len=config.data.seq_len,
        items_per_epoch=data.items_per_epoch,
        state=state,
        world_size=engine.dp_size,
        validates=validation is not None,
        ask_every=config.evaluation.every_steps,
    )

    if config.trainer.activation_checkpointing:
        trained.module.checkpoint_blocks()
    if resolved.compile:
        trained.module.compile_parts()
    job = Job(
        config=config,
        engine=engine,
        data=data,
        validation=validation,
        identity=identity,
        trained=trained,
        interview=interview,
        model=engine.setup(trained.module),
        optimizer=build_optimizer(config.optimizer, trained.module),
        schedule=schedule,
        state=state,
        origin=origin,
        resumed_step=state.step if origin else None,
        checkpoint=checkpoint,
        passed_over=passed_over,
        process_bytes=process_bytes,
        samples=None,
        as_written=loaded.as_written if loaded else None,
    )
    if checkpoint:
        job.load_tensors(checkpoint)
    else:
        seed_step(config.run.seed, -1, rank=0)
        trained.start()
        job.optimizer.take_weights()
    job.samples = samples_of(
        config,
        trained.module,
        tokenizer=data.facts.tokenizer,
        model_folder=model_folder,
        has_validation=validation is not None,
        engine=engine,
    )
    return job


def _build(
    config: Config,
    engine: Engine,
    data: TokenData | ChatData,
    *,
    model_folder: Path | None,
    tokenizer_folder: Path | None,
    chat_template: str | None,
) -> Trained:
    """The model that the config names, for the tokens of its data."""
    if isinstance(config.model, DecoderConfig):
        return build_decoder(
            config.model,
            needed_vocab=data.facts.vocab_size,
            tokenizer_folder=data.facts.tokenizer,
            eos_id=data.facts.eos_id,
            chat_template=chat_template,
            cut=engine.cuts,
        )
    assert model_folder is not None
    assert tokenizer_folder is not None
    return build_huggingface(
        config.model,
        model_folder,
        needed_vocab=data.facts.vocab_size,
        seq_len=config.data.seq_len,
        tokenizer_folder=tokenizer_folder,
        chat_template=chat_template,
        seed=config.run.seed,
        precision=engine.resolved.precision,
        device=engine.device,
        cut=engine.cuts,
    )


def _config_and_origin(
    loaded: LoadedConfig | None, *, resume: str | None, overrides: Sequence[str]
) -> tuple[Config, Origin | None]:
    if resume is None:
        if loaded is None:
            raise ConfigError("train needs a CONFIG, or --resume to go on with a run")
        return loaded.config, None
    if loaded is not None and resume == AUTO:
        return loaded.config, find_origin_if_any(loaded.config.output.run_id, Path(loaded.config.output.root_dir))
    if loaded is not None:
        return loaded.config, find_origin(resume, Path(loaded.config.output.root_dir))
    given = dict(override.split("=", 1) for override in overrides if "=" in override)
    origin = find_origin(resume, Path(given.get("output.root_dir", OutputConfig().root_dir)))
    return load_config(str(origin.run / "config.yaml"), overrides).config, origin


def _fetch(config: Config, engine: Engine) -> tuple[Path | None, Path | None]:
    """The folders of a model of transformers and of its tokenizer, fetched once, by one rank; None for the decoder."""
    named = config.data.tokenizer if isinstance(config.data, ChatConfig) else None
    if isinstance(config.model, DecoderConfig):
        if not isinstance(config.data, ChatConfig):
            return None, None
        named = named or config.model.init_from
        if named is None:
            raise ConfigError("data.tokenizer: the decoder has no tokenizer of its own; name a folder or a Hub id")
    with engine.main_first():
        if not engine.is_main:
            with suppress(ConfigError):  # what is not in this machine's cache is fetched below
                return _folders(config.model, named, local_only=True)
        return _folders(config.model, named, local_only=getattr(config.model, "local_files_only", False))


def _folders(
    model: HuggingFaceConfig | DecoderConfig, named: str | None, *, local_only: bool
) -> tuple[Path | None, Path | None]:
    from llmtrain.models.hub import fetch_tokenizer
    from llmtrain.models.huggingface_load import fetch

    found: tuple[Path | None, Path | None] = (None, None)
    if isinstance(model, HuggingFaceConfig):
        found = fetch(model.model_copy(update={"local_files_only": local_only}))
    return found[0], fetch_tokenizer(named, local_files_only=local_only) if named else found[1]


def _open_data(
    config: Config, engine: Engine, *, tokenizer_folder: Path | None
) -> tuple[TokenData | ChatData, ValidationData | ChatValidation | None, str | None]:
    """Training and validation data, made first where the config says how; and the chat template, if there is one."""
    if isinstance(config.data, ChatConfig):
        from llmtrain.recipes.rows.chat_data import open_rows

        assert tokenizer_folder is not None
        rows = open_rows(config.data, tokenizer_folder=tokenizer_folder, seed=config.run.seed, engine=engine)
        return rows.training, rows.validation, rows.template.text
    with engine.main_first():
        ready = ensure_shards(config)
    data = open_training_data(ready, seed=config.run.seed, rank=engine.dp_rank, world_size=engine.dp_size)
    return data, open_validation_data(ready, seed=config.run.seed, training=data), None
