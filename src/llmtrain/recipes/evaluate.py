"""`eval`: how well a model predicts held-out text."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from typing import Any

from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.recipes.held_out import evaluation_config, open_held_out
from llmtrain.recipes.open_model import base_of, load_language_model, locate_model
from llmtrain.tracking.logs import setup_logging
from llmtrain.tracking.progress import Progress


def evaluate(
    model: str,
    *,
    data: Sequence[str] = (),
    steps: int | None = None,
    batch_size: int | None = None,
    root_dir: str = "runs",
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte of `model` on `data` (token shards or rows), or on its run's validation data.

    Of rows, only what is supervised counts. `steps` batches of `batch_size` windows or rows; all of the data when not
    given. Raises ConfigError for what is not there.
    """
    began = time.monotonic()
    folder = locate_model(model, root_dir=root_dir)
    config = evaluation_config(folder, data=list(data))
    setup_logging(config.logging, run_folder=None, rank=0)
    trainer = config.trainer.model_copy(update={"compile": False})  # a compile takes longer than most evaluations
    engine = Engine(resolve(config.run, trainer, config.distributed), distributed=config.distributed)
    with engine.main_first():
        base_of(folder)  # fetched by one rank
    loaded = load_language_model(folder, device=engine.device)
    validation = open_held_out(config, loaded, engine=engine)
    rows = batch_size or trainer.micro_batch_size
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
