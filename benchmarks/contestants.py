"""The training benchmark's contestants: each trains the same 14M decoder in a process of its own.

    python -m benchmarks.contestants NAME STEPS   →   one line of JSON: seconds of each step, peak memory

Ours runs through the recipe behind `llmtrain train`; the peer is transformers' Trainer at its best settings.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).with_name("14m.yaml")
BATCH, LENGTH = 16, 256
PEERS: dict[str, dict[str, Any]] = {
    "trainer-fp32": {"torch_compile": True, "optim": "adamw_torch_fused"},
    "trainer-bf16": {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused"},
}
"""The Trainer's best settings for a processor without native bfloat16, and for one with it."""
LLAMA_14M = {
    "vocab_size": 8192,
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "max_position_embeddings": LENGTH,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True)
class Task:
    """Task of the Trainer: arguments of a LlamaConfig, and the size of a batch."""

    llama: Mapping[str, Any] = field(default_factory=lambda: LLAMA_14M)
    batch: int = BATCH
    length: int = LENGTH


def ours(steps: int) -> list[float]:
    """Seconds of each step, as the run's own metrics.jsonl has them; the first, which compiles, is left out."""
    from llmtrain.config.loading.load import load_config
    from llmtrain.tracking.sinks import read_metrics
    from llmtrain.verbs.train import train

    with tempfile.TemporaryDirectory() as folder:
        result = train(load_config(str(CONFIG), [f"trainer.max_steps={steps}", f"output.root_dir={folder}"]))
        lines = read_metrics(Path(result["run"]) / "metrics.jsonl")
    return [line["train/step_time_sec"] for line in lines if "train/step_time_sec" in line]


def trainer(steps: int, task: Task | None = None, **settings: Any) -> list[float]:
    """Seconds between the ends of steps of transformers' Trainer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    task = task or Task()
    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**task.llama, attn_implementation=attention))
    rows = torch.randint(0, task.llama["vocab_size"], (steps * task.batch, task.length))
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=task.batch,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **{"use_cpu": True, **settings},
        )
        data = [{"input_ids": row, "labels": row} for row in rows]
        Trainer(model=model, args=arguments, train_dataset=data, callbacks=[Clock()]).train()
    return [end - begin for begin, end in itertools.pairwise(ends)]


def main(name: str, steps: int) -> None:
    """Train, then print what was measured."""
    seconds = ours(steps) if name == "ours" else trainer(steps, **PEERS[name])
    from llmtrain.tracking.system import peak_memory_bytes

    print(json.dumps({"seconds": seconds, "peak_memory_bytes": peak_memory_bytes()}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
