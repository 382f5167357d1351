"""`eval`: how well a model predicts held-out text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from llmtrain.config.data import TokensConfig
from llmtrain.config.errors import ConfigError
from llmtrain.config.load import load_config
from llmtrain.config.schema import Config
from llmtrain.data.tokens import open_validation_data
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.models.folder import read_model_folder
from llmtrain.recipes.prepare import ensure_shards
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress
from llmtrain.training.runs import find_model


def evaluate(
    model: str,
    *,
    data: Sequence[str] = (),
    steps: int | None = None,
    batch_size: int | None = None,
    root_dir: str = "runs",
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on the shards `data`, or on its run's validation data.

    `steps` batches of `batch_size` windows; all of the data when not given. Raises ConfigError for what is not there.
    """
    began = time.monotonic()
    folder = find_model(model, Path(root_dir))
    decoder, vocab_size = read_model_folder(folder)
    config = _config_of(folder, data=data, max_seq_len=decoder.config.max_seq_len)
    setup_logging(config.logging, run_folder=None, rank=0)
    trainer = config.trainer.model_copy(update={"compile": False})  # a compile takes longer than most evaluations
    engine = Engine(resolve(config.run, trainer, config.distributed), distributed=config.distributed)
    with engine.main_first():
        data_config = ensure_shards(config)
    validation = open_validation_data(data_config, seed=config.run.seed)
    if validation is None:
        raise ConfigError(f"{folder} names no validation data: name some with --data")
    if validation.facts.vocab_size > vocab_size:
        raise ConfigError(
            f"{validation.name} has tokens of a vocabulary of {validation.facts.vocab_size}, but the model's is "
            f"{vocab_size}: prepare the data with the model's tokenizer"
        )
    rows = batch_size or trainer.micro_batch_size
    batches = validation.evaluation_batches(
        batch_size=rows, max_batches=steps, rank=engine.rank, world_size=engine.world_size
    )
    total = min(-(-validation.num_items // rows), steps or validation.num_items)
    with Progress(quiet=not engine.is_main) as progress, closing(batches):
        done = iter(range(total))
        result = evaluate_loss(
            engine.setup(decoder),
            batches,
            engine=engine,
            tokens_per_byte=validation.facts.tokens_per_byte,
            before_batch=lambda: progress.track("evaluating", next(done, total), total),
        )
    engine.close()
    return {
        "model": str(folder),
        "data": validation.name,
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "seconds": time.monotonic() - began,
    }


def _config_of(folder: Path, *, data: Sequence[str], max_seq_len: int) -> Config:
    """The config that the model was trained with, or a plain one for a model from elsewhere; with `data` if named."""
    beside = folder.parent / "config.yaml"
    if beside.is_file():
        config = load_config(str(beside)).config
        if not data:
            return config
    elif not data:
        raise ConfigError(f"{folder} stands alone, so nothing says what to measure it on: name shards with --data")
    else:
        config = Config(data=TokensConfig(train=list(data)))
    shards = TokensConfig(train=list(data), val=list(data), seq_len=min(config.data.seq_len, max_seq_len))
    return config.model_copy(update={"data": shards, "prepare": None})
