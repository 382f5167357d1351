"""Configs that prepare a corpus and train on it in a second, or fine-tune, and what a test asks of the run."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

CORPUS = ["json/*.py", "collections/*.py", "email/*.py"]

SYNTHETIC: dict[str, Any] = {
    "data": {"name": "synthetic", "seq_len": 32, "vocab_size": 300, "num_items": 100, "num_val_items": 0},
    "model": {"max_seq_len": 64, "d_model": 32, "num_layers": 2, "attention": {"num_heads": 2}},
    "trainer": {"micro_batch_size": 4, "precision": "32", "compile": False},
}
"""A config that needs no corpus: what `plan` says of it is known."""


def tiny_config(shards: Path, root: Path) -> dict[str, Any]:
    """Two layers, 32 wide, on windows of 32 tokens: about 12 ms a step."""
    return {
        "run": {"name": "tiny", "seed": 7, "device": "cpu"},
        "prepare": {
            "input": [f"{sysconfig.get_path('stdlib')}/{pattern}" for pattern in CORPUS],
            "tokenizer": {"kind": "bpe", "vocab_size": 400},
            "output": str(shards),
            "val_fraction": 0.15,
            "num_workers": 1,
        },
        "data": {"name": "tokens", "train": str(shards / "train"), "val": str(shards / "val"), "seq_len": 32},
        "model": {"max_seq_len": 64, "d_model": 32, "num_layers": 2, "dropout": 0.1, "attention": {"num_heads": 2}},
        "trainer": {
            "max_steps": 30,
            "micro_batch_size": 4,
            "precision": "32",
            "compile": False,
            "log_every_steps": 1,
            "eval_every_steps": 10,
            "eval_steps": 4,
            "save_every_steps": 10,
        },
        "optimizer": {"lr": 0.003},
        "scheduler": {"warmup_steps": 5},
        "tracking": {"tensorboard": {"enabled": False}},
        "output": {"root_dir": str(root)},
    }


def tiny_tuning(folder: Path, rows: Path, model: dict[str, Any], *, seq_len: int, **trainer: Any) -> dict[str, Any]:
    """Fine-tunes `model`, the section of a config, on chat rows of which a fifth is held out; its runs in `folder`."""
    return {
        "run": {"name": "tuned", "seed": 7, "device": "cpu"},
        "model": model,
        "data": {
            "name": "chat",
            "train": str(rows),
            "val_fraction": 0.2,
            "seq_len": seq_len,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {"micro_batch_size": 2, "precision": "32", "compile": False, **trainer},
        "optimizer": {"lr": 0.01},
        "scheduler": {"warmup_steps": 2},
        "tracking": {"tensorboard": {"enabled": False}},
        "output": {"root_dir": str(folder / "runs")},
    }


def write_config(path: Path, keys: dict[str, Any]) -> Path:
    """Write the keys as YAML to `path`."""
    with path.open("w") as file:
        YAML().dump(keys, file)
    return path


def weight_hash(run: Path) -> str:
    """sha256 of the last checkpoint's weights and optimizer state: equal only if every bit is."""
    digest = hashlib.sha256()
    checkpoint = run / "checkpoints" / "latest"
    for file in sorted([*checkpoint.glob("model/*.safetensors"), *checkpoint.glob("optimizer/*.safetensors")]):
        digest.update(file.name.encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()
