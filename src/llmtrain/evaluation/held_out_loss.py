"""Measures a model's loss, perplexity and bits per byte on held-out text; in rows, only of supervised tokens."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.folder import evaluation_folder, write_metrics
from llmtrain.evaluation.held_out import evaluation_config, open_held_out
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.generation.open_model import base_of, load_language_model
from llmtrain.generation.precision import AUTOCAST, named_precision
from llmtrain.runs.stores import runs_folder
from llmtrain.tracking.progress import Progress


def measure_loss(
    folder: Path,
    settings: EvaluationConfig,
    *,
    given: Mapping[str, Any],
    steps: int | None,
    root: str,
    engine: Engine,
    trusts_code: bool = False,
) -> dict[str, Any]:
    """Measure the model in `folder` and write metrics.json; return its document on every rank.

    `given` are the keys from the command line; `steps` limits the batches of all ranks together; `trusts_code`: run the
    model's Python code. Raises ConfigError for a key that does not apply to the loss, and for data that cannot be read.
    """
    if needless := sorted(given.keys() - {"data", "batch_size"}):
        raise ConfigError(
            f"--{needless[0].replace('_', '-')} is for rows with answers (prompts with completions, or messages): name "
            "some with --data"
        )
    began = time.monotonic()
    config = evaluation_config(folder, data=settings.files)
    with engine.main_first():
        base_of(folder, trust_remote_code=trusts_code)
    asked = engine.resolved.precision
    loaded = load_language_model(folder, device=engine.device, trust_remote_code=trusts_code, precision=asked)
    validation = open_held_out(config, loaded, engine=engine)
    rows = given.get("batch_size") or config.trainer.micro_batch_size
    share = {"batch_size": rows, "max_batches": steps, "rank": engine.rank, "world_size": engine.world_size}
    batches = validation.evaluation_batches(**share)
    total = validation.num_batches(**share)
    with loaded.computing(), Progress(quiet=not engine.is_main) as progress, closing(batches):
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
        output = evaluation_folder(folder, root=runs_folder(root), identity=f"loss, {now}")
        document = {
            "model": str(folder),
            "precision": named_precision(loaded.model, AUTOCAST.get(asked), engine.device),
            "data": validation.name,
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
            "tokens": result.num_tokens,
            "time": now,
            "output": str(output),
            "seconds": time.monotonic() - began,
        }
        write_metrics(output, document)
        return document

    return engine.from_main(write)
