"""Makes golden_losses.json: the loss sequences that a refactor must leave as they are.

    .venv/bin/python tests/golden/make_golden.py

Run it only for a change that is meant to change the numbers, and say why in the commit. The data is synthetic, so the
sequences depend on no corpus; few items are seen again and again, so that there is something to learn.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from llmtrain.config.loading.load import load_config
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train
from tests.support.tiny_run import write_config

GOLDEN = Path(__file__).with_name("golden_losses.json")
LLAMA_LIKE: dict[str, Any] = {"attention": {"variant": "gqa", "num_heads": 4, "num_kv_heads": 2, "qk_norm": True}}
GPT2_LIKE: dict[str, Any] = {
    "attention": {"num_heads": 4, "bias": True},
    "positional": {"encoding": "learned"},
    "ffn": {"variant": "mlp", "activation": "gelu_tanh", "bias": True},
    "norm": {"type": "layernorm"},
}
CASES: dict[str, dict[str, Any]] = {
    "llama-like, adamw, cosine": {"model": LLAMA_LIKE},
    "gpt2-like, adamw, linear": {"model": GPT2_LIKE, "scheduler": {"name": "linear", "warmup_steps": 4}},
    "llama-like, muon, wsd, dropout": {
        "model": {**LLAMA_LIKE, "dropout": 0.1},
        "optimizer": {"name": "muon", "lr": 0.01},
        "scheduler": {"name": "wsd"},
    },
}


def losses_of(case: str) -> list[float]:
    """The loss of each of 24 steps, and last the validation loss."""
    keys = CASES[case]
    config: dict[str, Any] = {
        "run": {"device": "cpu", "seed": 5},
        "data": {"name": "synthetic", "seq_len": 24, "vocab_size": 64, "num_items": 16, "num_val_items": 8},
        "model": {"d_model": 32, "num_layers": 2, "max_seq_len": 32, **keys["model"]},
        "trainer": {
            "max_steps": 24,
            "micro_batch_size": 4,
            "grad_accum_steps": 2,
            "precision": "32",
            "compile": False,
            "log_every_steps": 1,
        },
        "optimizer": keys.get("optimizer", {"lr": 0.01}),
        "scheduler": keys.get("scheduler", {"warmup_steps": 4}),
        "tracking": {"tensorboard": {"enabled": False}},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = write_config(Path(folder) / "golden.yaml", config)
        result = train(load_config(str(file), [f"output.root_dir={folder}/runs", "logging.level=WARNING"]))
        lines = read_metrics(Path(result["run"]) / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line] + [result["val_loss"]]


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({case: losses_of(case) for case in CASES}, indent=1) + "\n", encoding="utf-8")
