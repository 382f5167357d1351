"""The training benchmark's contestants: each trains the same 14M decoder in a process of its own.

    python benchmarks/contestants.py NAME STEPS   →   one line of JSON: seconds of each step, peak memory

Ours runs through the recipe behind `llmtrain train`; the peer is transformers' Trainer, at its defaults and at its best
settings.
"""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).with_name("14m.yaml")
BATCH, LENGTH = 16, 256
PEERS: dict[str, dict[str, Any]] = {
    "trainer-default": {},
    "trainer-best": {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused"},
}


def ours(steps: int) -> list[float]:
    """Seconds of each step, as the run's own metrics.jsonl has them; the first, which compiles, is left out."""
    from llmtrain.config.load import load_config
    from llmtrain.recipes.train import train
    from llmtrain.tracking.sinks import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        result = train(load_config(str(CONFIG), [f"trainer.max_steps={steps}", f"output.root_dir={folder}"]))
        lines = read_metrics(Path(result["run"]) / "metrics.jsonl")
    return [line["train/step_time_sec"] for line in lines if "train/step_time_sec" in line]


def trainer(steps: int, **settings: Any) -> list[float]:
    """Seconds between the ends of steps of transformers' Trainer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

    attention = settings.pop("attn_implementation", "sdpa")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8192,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            attn_implementation=attention,
        )
    )
    rows = torch.randint(0, 8192, (steps * BATCH, LENGTH))
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            **settings,
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
