"""Fine-tuning beside TRL's SFTTrainer: LoRA on short rows, tokens that are no padding per second.

    python -m benchmarks.tuning [--rounds 3] [--steps 30]

The base is a Llama of 6 layers, 384 wide, with a vocabulary of 8192; LoRA has rank 16 on all linear layers; 3,000 rows
of prompt and completion have 57 tokens on average and 504 at most, at length 512. A round runs each contestant once, in
a process of its own. Each trains on the same supervised tokens. The first steps, which compile and warm up, are not
counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import floor_of_benchmark, print_machine

ROWS, LONGEST, LENGTH, VOCAB_SIZE = 3_000, 504, 512, 8192
PACKS, RANK = 4, 16
WARM_UP_STEPS = 3
UNPACKED_BATCH = 32
UNPACKED_WARM_UP_STEPS = ROWS // UNPACKED_BATCH
"""An epoch: rows of every length have come by."""
PEERS: dict[str, dict[str, Any]] = {
    "trl": {"per_device_train_batch_size": 16},
    "trl-packed": {"per_device_train_batch_size": 4, "packing": True},
    "trl-bf16": {"per_device_train_batch_size": 16, "bf16": True},
    "trl-bf16-packed": {"per_device_train_batch_size": 4, "bf16": True, "packing": True},
    "trl-bf16-weights-packed": {
        "per_device_train_batch_size": 4,
        "bf16": True,
        "packing": True,
        "model_init_kwargs": {"dtype": "bfloat16"},
    },
    "trl-bf16-compiled": {"per_device_train_batch_size": 16, "bf16": True, "torch_compile": True},
}
"""Batches of about as many tokens each."""
CONTESTANTS = ("ours", "ours-unpacked", *PEERS)


def set_up(folder: Path) -> None:
    """The base with its tokenizer, of a word a token, and the rows."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCAB_SIZE - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=6,
            num_attention_heads=6,
            max_position_embeddings=LENGTH,
            tie_word_embeddings=True,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder / "base")
    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(3.6, 0.85, ROWS) + 6, 8, LONGEST).astype(int)
    lengths[0] = LONGEST
    with (folder / "rows.jsonl").open("w") as file:
        for length in lengths.tolist():
            ids = draw.integers(0, VOCAB_SIZE - 3, length - 1).tolist()
            prompt, completion = ids[: length // 2], ids[length // 2 :]
            row = {
                "prompt": " ".join(f"w{i}" for i in prompt),
                "completion": " " + " ".join(f"w{i}" for i in completion),
            }
            file.write(json.dumps(row) + "\n")


def ours(folder: Path, steps: int, *, packing: bool) -> tuple[float, float]:
    """Tokens and seconds, through the recipe behind `llmtrain train`."""
    from llmtrain.config.loading.load import load_config
    from llmtrain.tracking.sinks import read_metrics
    from llmtrain.verbs.train import train

    warm_up = WARM_UP_STEPS if packing else UNPACKED_WARM_UP_STEPS
    config = {
        "model": {"name": "huggingface", "path": str(folder / "base"), "lora": {"r": RANK, "alpha": 32}},
        "data": {
            "name": "chat",
            "train": str(folder / "rows.jsonl"),
            "val_fraction": 0,
            "seq_len": LENGTH,
            "packing": packing,
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "max_steps": steps + warm_up,
            "micro_batch_size": PACKS if packing else UNPACKED_BATCH,
            "log_every_steps": 1,
            "eval_every_steps": 10**6,
            "save_every_steps": 10**6,
        },
        "tracking": {"tensorboard": {"enabled": False}},
        "logging": {"level": "ERROR"},
        "output": {"root_dir": str(folder / "runs")},
    }
    file = folder / "tuned.json"
    file.write_text(json.dumps(config))
    result = train(load_config(str(file)))
    lines = read_metrics(Path(result["run"]) / "metrics.jsonl")
    timed = [
        (line["train/tokens_total"], line["train/step_time_sec"]) for line in lines if "train/step_time_sec" in line
    ]
    return timed[-1][0] - timed[warm_up - 1][0], sum(seconds for _, seconds in timed[warm_up:])


def trl(folder: Path, steps: int, **settings: Any) -> tuple[float, float]:
    """The same of TRL's SFTTrainer."""
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    supervised: list[int] = []
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *arguments: Any, **rest: Any) -> None:
            ends.append(time.perf_counter())

    class Counting(SFTTrainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **rest: Any) -> Any:
            supervised.append(int((inputs["labels"] != -100).sum()))
            return super().compute_loss(model, inputs, *arguments, **rest)

    settings = {"max_steps": steps + WARM_UP_STEPS, "max_length": LENGTH, "use_cpu": True, "bf16": False, **settings}
    with tempfile.TemporaryDirectory() as output:
        Counting(
            model=str(folder / "base"),
            args=SFTConfig(output_dir=output, save_strategy="no", report_to=[], disable_tqdm=True, **settings),
            train_dataset=datasets.load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
            callbacks=[Clock()],
        ).train()
    return sum(supervised[WARM_UP_STEPS:]) * _tokens_per_supervised(folder), ends[-1] - ends[WARM_UP_STEPS - 1]


def _tokens_per_supervised(folder: Path) -> float:
    """Tokens of a row for each that is supervised: those of the completion, and the end token after it."""
    tokens = supervised = 0
    for line in (folder / "rows.jsonl").read_text().splitlines():
        row = json.loads(line)
        completion = len(row["completion"].split()) + 1
        tokens, supervised = tokens + len(row["prompt"].split()) + completion, supervised + completion
    return tokens / supervised


def run(name: str, folder: Path, steps: int) -> None:
    """One contestant: prints a line of JSON."""
    ways: dict[str, Callable[[], tuple[float, float]]] = {
        "ours": lambda: ours(folder, steps, packing=True),
        "ours-unpacked": lambda: ours(folder, steps, packing=False),
    }
    tokens, seconds = ways[name]() if name in ways else trl(folder, steps, **PEERS[name])
    from llmtrain.tracking.system import peak_memory_bytes

    print(json.dumps({"tokens_per_sec": tokens / seconds, "peak_memory_bytes": peak_memory_bytes()}))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--only", nargs="*", choices=CONTESTANTS, default=CONTESTANTS)
    parser.add_argument("--run", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run(arguments.run[0], Path(arguments.run[1]), arguments.steps)
    speeds: dict[str, list[float]] = {name: [] for name in arguments.only}
    memory: dict[str, float] = dict.fromkeys(arguments.only, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        set_up(Path(folder))
        for round_ in range(arguments.rounds):
            for name in arguments.only:
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.tuning",
                    "--run",
                    name,
                    folder,
                    "--steps",
                    str(arguments.steps),
                ]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
                result = json.loads(done.stdout.strip().splitlines()[-1])
                speeds[name].append(result["tokens_per_sec"])
                memory[name] = max(memory[name], result["peak_memory_bytes"] / 1e9)
                print(
                    f"round {round_ + 1}  {name:<18} {speeds[name][-1]:8.0f} tok/s  {memory[name]:.2f} GB", flush=True
                )
    first = statistics.median(speeds[arguments.only[0]])
    print(f"\n{'':<18} {'tok/s':>8} {'lowest':>8} {'highest':>8} {'peak GB':>8} {'ours is':>8}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<18} {median:8.0f} {min(values):8.0f} {max(values):8.0f} {memory[name]:8.2f} {first / median:7.2f}×"
        )
    print("\nwanted: a peak memory that is no higher than that of the best of TRL")
    print_machine()
    floor = floor_of_benchmark(batch=PACKS, length=LENGTH, lora_rank=RANK)
    print(f"those of a LoRA step on {PACKS} packs of {LENGTH} take {floor:.3f} s")


if __name__ == "__main__":
    main()
