"""`eval`: how well a model predicts held-out text, and how it answers the questions of rows.

MODEL, config, data ─┬─ rows that ask something ─▶ evaluate_rows: loss, generation metrics, comparison, files
                     ├─ tasks ─▶ benchmarks
                     └─ token shards, rows of text, the run's validation data ─▶ the loss, here
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtrain.config.loading.load import load_config, plain_config, section_of
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.config.sections.schema import Config
from llmtrain.config.sections.training import RendezvousConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.native_bf16 import computes_bf16
from llmtrain.distributed.resolve import resolve, resolve_device
from llmtrain.errors import ConfigError
from llmtrain.evaluation.baseline import find_base, find_baseline
from llmtrain.evaluation.held_out import ask_something
from llmtrain.evaluation.held_out_loss import measure_loss
from llmtrain.generation.open_model import (
    base_of,
    config_beside,
    config_file_beside,
    locate_model,
    trusts_code,
    tuned_from,
)
from llmtrain.installing import install_extra
from llmtrain.tracking.logs import setup_logging

NO_TRAINING = ("trainer.keep_best=null", "trainer.early_stopping=null", "evaluation.every_steps=null")
"""Overrides that drop a config's metrics in training, which need not agree with what is measured now."""


def evaluate(
    model: str | None = None,
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    root_dir: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Measure `model` on the rows or token shards of `evaluation.data`, or on its run's validation data.

    `model`: when not given, the run of the config's output.run_id, or the newest. `config` and `overrides` say how; its
    run's own config where none is named. `settings` are keys of the `evaluation` section that win over it. `steps`:
    batches of a loss. `trust_remote_code`: run the Python code that comes with the models. Raises ConfigError for what
    is not there, and what does not go together.
    """
    overrides = [*NO_TRAINING, *overrides]
    named = load_config(config, overrides).config if config is not None else None
    root = root_dir or (named or plain_config(())).output.root_dir
    ref = model or (named and named.output.run_id) or "latest"
    folder = locate_model(ref, root_dir=root, trust_remote_code=trust_remote_code)
    trusts = trust_remote_code or trusts_code(config_beside(folder))  # a run's base brings the code that the run trusts
    about = named or _own_config(folder, overrides)
    given = settings or {}
    chosen = _with(about.evaluation, given)
    if chosen.subject == "base":
        folder = find_base(folder, trust_remote_code=trusts)
    setup_logging(about.logging, run_folder=None, rank=int(os.environ.get("RANK", "0")))
    asked_here = named is not None or any(override.startswith("trainer.precision=") for override in overrides)
    engine = _engine(about, precision_asked_here=asked_here)
    try:
        if chosen.tasks:
            return _measure_tasks(folder, chosen, about, given=given, root=root, engine=engine, trusts_code=trusts)
        if not chosen.files or not ask_something(chosen.files):
            return measure_loss(folder, chosen, given=given, steps=steps, root=root, engine=engine, trusts_code=trusts)
        if steps is not None:
            raise ConfigError("--steps cuts a loss short; of rows, --max-samples N takes the first of each file")

        from llmtrain.evaluation.rows import Subjects, evaluate_rows

        with engine.main_first():
            base_of(folder, trust_remote_code=trusts)  # fetched by one rank
            baseline = find_baseline(folder, chosen, root=root, trust_remote_code=trust_remote_code)
        own = config_beside(folder)
        trained_on = own or (named if chosen.subject == "model" else None)
        subjects = Subjects(
            model=folder,
            baseline=baseline,
            trained_on=trained_on,
            trusts_model=trusts,
            trusts_baseline=trust_remote_code or (trusts and baseline is not None and baseline == tuned_from(folder)),
        )
        return evaluate_rows(subjects, chosen, seed=about.run.seed, root_dir=root, engine=engine)
    finally:
        engine.close()


def _measure_tasks(
    folder: Path,
    settings: EvaluationConfig,
    about: Config,
    *,
    given: Mapping[str, Any],
    root: str,
    engine: Engine,
    trusts_code: bool,
) -> dict[str, Any]:
    if needless := sorted(given.keys() & {"data", "max_new_tokens", "temperature", "top_p"}):
        raise ConfigError(f"--{needless[0].replace('_', '-')} is for rows; a task of --tasks says that itself")
    if given.get("baseline") is not None:
        raise ConfigError("--baseline compares answers to rows; measure the baseline by the same --tasks for itself")
    if find_spec("lm_eval") is None:
        raise ConfigError(f"--tasks needs lm-evaluation-harness: {install_extra('eval')}")
    from llmtrain.evaluation.benchmarks import evaluate_tasks

    with engine.main_first():
        base_of(folder, trust_remote_code=trusts_code)
    seed = about.run.seed
    return evaluate_tasks(folder, settings, seed=seed, root_dir=root, engine=engine, trusts_code=trusts_code)


# -- what is meant -----------------------------------------------------------------------------------------------------


def _own_config(folder: Path, overrides: Sequence[str]) -> Config:
    """Return the config of the model's run, or a plain one for a model that stands alone."""
    beside = config_file_beside(folder)
    return load_config(str(beside), overrides).config if beside else plain_config(overrides)


def _with(settings: EvaluationConfig, given: Mapping[str, Any]) -> EvaluationConfig:
    """Return the section with the values of the command line. Raises ConfigError for a wrong value."""
    rows_instead: dict[str, Any] = {"tasks": []} if given.get("data") and not given.get("tasks") else {}
    return section_of(EvaluationConfig, {**settings.model_dump(), **rows_instead, **given}, name="evaluation")


def _engine(about: Config, *, precision_asked_here: bool) -> Engine:
    """Return the engine. Whatever the run's strategy, here each process has the full model and a share of the rows.

    Unless this command asks for a precision, all models have the same on a GPU, and none that a CPU emulates. Float8
    is for training, and a compile takes longer than most evaluations: neither is used here.
    """
    trainer = about.trainer.model_copy(update={"compile": False, "precision": about.trainer.autocast_precision})
    on_gpu = (device := resolve_device(about.run.device)).startswith("cuda")
    if not precision_asked_here and (on_gpu or (trainer.precision.startswith("bf16") and not computes_bf16(device))):
        trainer = trainer.model_copy(update={"precision": "auto"})
    distributed = about.distributed.model_copy(update={"strategy": "auto", "rendezvous": RendezvousConfig()})
    return Engine(resolve(about.run, trainer, distributed), distributed=distributed)
