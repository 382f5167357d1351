"""`eval`: how well a model predicts held-out text, and how it answers the questions of rows.

MODEL, config, data ─┬─ rows that ask something ─▶ evaluate_rows: loss, generation metrics, comparison, files
                     ├─ tasks ─▶ benchmarks
                     └─ token shards, rows of text, the run's validation data ─▶ the loss, here
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtrain.config.errors import ConfigError
from llmtrain.config.evaluation import AUTO_BASELINE, LAST_PUBLISHED, EvaluationConfig
from llmtrain.config.load import load_config, plain_config, section_of
from llmtrain.config.schema import Config
from llmtrain.config.training import RendezvousConfig
from llmtrain.data.chat.rows import Row, read_rows
from llmtrain.data.chat.shapes import is_text
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.recipes.evaluation.folder import evaluation_folder, write_figures
from llmtrain.recipes.evaluation.held_out import are_rows, evaluation_config, open_held_out
from llmtrain.recipes.loading.open_model import (
    base_of,
    config_beside,
    config_file_beside,
    load_language_model,
    locate_model,
    tuned_from,
)
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress

PUBLISHED_NAME = "last-published.json"
"""In the folder of all runs: `publish` writes there, under `model`, what it accepted last."""

NO_TRAINING = ("trainer.keep_best=null", "trainer.early_stopping=null", "evaluation.every_steps=null")
"""What a config says of figures in training need not agree with what is measured now."""


def evaluate(
    model: str | None = None,
    *,
    config: str | None = None,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    steps: int | None = None,
    root_dir: str | None = None,
) -> dict[str, Any]:
    """How good `model` is on the rows or token shards of `evaluation.data`, or on its run's validation data.

    `model`: when not given, the run of the config's output.run_id, or the newest. `config` and `overrides` say how; its
    run's own config where none is named. `settings` are keys of the `evaluation` section that win over it. `steps`:
    batches of a loss. Raises ConfigError for what is not there, and what does not go together.
    """
    overrides = [*NO_TRAINING, *overrides]
    named = load_config(config, overrides).config if config is not None else None
    root = root_dir or (named or plain_config(())).output.root_dir
    folder = locate_model(model or (named and named.output.run_id) or "latest", root_dir=root)
    about = named or _own_config(folder, overrides)
    chosen = _with(about.evaluation, settings or {})
    if chosen.subject == "base":
        folder = _base(folder)
    setup_logging(about.logging, run_folder=None, rank=int(os.environ.get("RANK", "0")))
    engine = _engine(about)
    try:
        if chosen.tasks:
            return _measure_tasks(folder, chosen, about, given=settings or {}, root=root, engine=engine)
        if not chosen.files or not _ask_something(chosen.files):
            return _measure_loss(folder, chosen, given=settings or {}, steps=steps, root=root, engine=engine)
        if steps is not None:
            raise ConfigError("--steps cuts a loss short; of rows, --max-samples N takes the first of each file")

        from llmtrain.recipes.evaluation.rows import Subjects, evaluate_rows

        with engine.main_first():
            base_of(folder)  # fetched by one rank
            baseline = _baseline(folder, chosen, root=root)
        own = config_beside(folder)
        trained_on = own or (named if chosen.subject == "model" else None)
        subjects = Subjects(model=folder, baseline=baseline, trained_on=trained_on)
        return evaluate_rows(subjects, chosen, seed=about.run.seed, root_dir=root, engine=engine)
    finally:
        engine.close()


def _measure_tasks(
    folder: Path, settings: EvaluationConfig, about: Config, *, given: Mapping[str, Any], root: str, engine: Engine
) -> dict[str, Any]:
    if needless := sorted(given.keys() & {"data", "max_new_tokens", "temperature", "top_p"}):
        raise ConfigError(f"--{needless[0].replace('_', '-')} is for rows; a task of --tasks says that itself")
    if given.get("baseline") is not None:
        raise ConfigError("--baseline compares answers to rows; measure the baseline by the same --tasks for itself")
    if find_spec("lm_eval") is None:
        raise ConfigError("--tasks needs lm-evaluation-harness: pip install 'llmtrain[eval]'")
    from llmtrain.recipes.evaluation.benchmarks import evaluate_tasks

    with engine.main_first():
        base_of(folder)
    return evaluate_tasks(folder, settings, seed=about.run.seed, root_dir=root, engine=engine)


def _measure_loss(
    folder: Path,
    settings: EvaluationConfig,
    *,
    given: Mapping[str, Any],
    steps: int | None,
    root: str,
    engine: Engine,
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte; of rows, only what is supervised counts."""
    if needless := sorted(given.keys() - {"data", "batch_size"}):
        raise ConfigError(
            f"--{needless[0].replace('_', '-')} is for rows that are answered, prompts with completions or messages: "
            "name some with --data"
        )
    began = time.monotonic()
    config = evaluation_config(folder, data=settings.files)
    with engine.main_first():
        base_of(folder)
    loaded = load_language_model(folder, device=engine.device)
    validation = open_held_out(config, loaded, engine=engine)
    rows = given.get("batch_size") or config.trainer.micro_batch_size
    batches = validation.evaluation_batches(
        batch_size=rows, max_batches=steps, rank=engine.rank, world_size=engine.world_size
    )
    total = min(-(-validation.num_items // rows), steps or validation.num_items)
    with Progress(quiet=not engine.is_main) as progress, closing(batches):
        done = iter(range(total))
        result = evaluate_loss(
            engine.setup(loaded.model),
            batches,
            engine=engine,
            tokens_per_byte=validation.facts.tokens_per_byte,
            before_batch=lambda: progress.track("evaluating", next(done, total), total),
        )

    def write() -> dict[str, Any]:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        output = evaluation_folder(folder, root=Path(root), identity=f"loss, {now}")
        document = {
            "model": str(folder),
            "data": validation.name,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.num_tokens,
            "time": now,
            "output": str(output),
            "seconds": time.monotonic() - began,
        }
        write_figures(output, document)
        return document

    return engine.from_main(write)


# -- what is meant -----------------------------------------------------------------------------------------------------


def _own_config(folder: Path, overrides: Sequence[str]) -> Config:
    """That of the model's run, or a plain one for a model that stands alone."""
    beside = config_file_beside(folder)
    return load_config(str(beside), overrides).config if beside else plain_config(overrides)


def _with(settings: EvaluationConfig, given: Mapping[str, Any]) -> EvaluationConfig:
    """The section with what was said on the command line. Raises ConfigError for a value that cannot be."""
    rows_instead: dict[str, Any] = {"tasks": []} if given.get("data") and not given.get("tasks") else {}
    return section_of(EvaluationConfig, {**settings.model_dump(), **rows_instead, **given}, name="evaluation")


def _engine(about: Config) -> Engine:
    """The machine. However a run was spread over processes, here each has the whole model and a share of the rows."""
    trainer = about.trainer.model_copy(update={"compile": False})  # a compile takes longer than most evaluations
    distributed = about.distributed.model_copy(update={"strategy": "auto", "rendezvous": RendezvousConfig()})
    return Engine(resolve(about.run, trainer, distributed), distributed=distributed)


def _ask_something(files: Sequence[str]) -> bool:
    """Whether these are rows that can be answered; token shards and rows of text have a loss alone."""
    if not are_rows(list(files)):
        return False
    first = next(read_rows(files[0], key="evaluation.data", default_split="test"))
    return not (isinstance(first, Row) and is_text(first.values))


def _base(folder: Path) -> Path:
    base = tuned_from(folder)
    if base is None:
        raise ConfigError(f"evaluation.subject is base, but nothing says what {folder} was tuned from: name the base")
    return base


def _baseline(folder: Path, settings: EvaluationConfig, *, root: str) -> Path | None:
    if settings.baseline is None:
        return None
    if settings.baseline == AUTO_BASELINE:
        try:
            return None if settings.subject == "base" else tuned_from(folder)
        except ConfigError as error:
            raise ConfigError(f"{error}. Name another --baseline, or compare with none: --no-baseline") from error
    ref = _last_published(root) if settings.baseline == LAST_PUBLISHED else settings.baseline
    try:
        baseline = locate_model(ref, root_dir=root)
        base_of(baseline)
    except ConfigError as error:
        if settings.baseline != LAST_PUBLISHED:
            raise
        raise ConfigError(
            f"what was published last, {ref} (says {Path(root) / PUBLISHED_NAME}), is not to be had: {error}. Name "
            "another --baseline, or compare with none: --no-baseline"
        ) from error
    if baseline == folder:
        raise ConfigError(f"evaluation.baseline: {settings.baseline} is the model itself, {folder}")
    return baseline


def _last_published(root: str) -> str:
    file = Path(root) / PUBLISHED_NAME
    try:
        return str(json.loads(file.read_text(encoding="utf-8"))["model"])
    except FileNotFoundError:
        raise ConfigError(f"nothing was published from {Path(root).absolute()} yet: there is no {file.name}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} does not say what was published last ({error!r})") from error
