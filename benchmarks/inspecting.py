"""Measure how many short rows `inspect` looks at in a second: bare, and with a tokenizer and a chat template.

    python -m benchmarks.inspecting [--rows 200000] [--rounds 3]

Rows are conversations of one question and one answer, mean 57 tokens. A round runs each command once, as a user would,
in a process of its own; its start counts too. Processor time stands beside wall time: on a machine that others use it
is the steadier of the two.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from benchmarks.machine import print_machine

WORDS = (
    "the a of to in is it model data row answer question how what why list python function returns value number text "
    "string and or with for each line file reads writes open close large small token"
)
CONTROL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    '{%- for message in messages %}{{ "<|im_start|>" + message["role"] + "\\n" + message["content"] + "<|im_end|>\\n" '
    '}}{% endfor %}{%- if add_generation_prompt %}{{ "<|im_start|>assistant\\n" }}{% endif %}'
)
WANTED = 20_000


def set_up(folder: Path, num_rows: int) -> None:
    """Rows, a tokenizer of their words, and a config."""
    drawn, words = random.Random(0), WORDS.split()

    def text(shortest: int, longest: int) -> str:
        return " ".join(drawn.choices(words, k=drawn.randint(shortest, longest)))

    with (folder / "rows.jsonl").open("w") as file:
        for number in range(num_rows):
            turns = [("user", f"{number} {text(5, 20)}?"), ("assistant", f"{text(8, 45)}.")]
            row = {"messages": [{"role": role, "content": content} for role, content in turns]}
            file.write(json.dumps(row) + "\n")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["</s>", *CONTROL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([text(100, 200) for _ in range(2000)], trainer)
    (folder / "tokenizer").mkdir()
    backend.save(str(folder / "tokenizer" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {
        "model": {"name": "huggingface", "path": str(folder / "tokenizer")},
        "data": {"name": "chat", "train": str(folder / "rows.jsonl"), "seq_len": 512},
    }
    (folder / "config.yaml").write_text(json.dumps(config))


def measure(what: Path) -> tuple[float, float, dict[str, object]]:
    """Wall seconds and processor seconds of the command, and what it said."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "llmtrain", "inspect", str(what), "--json"], capture_output=True)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"inspect {what} failed:\n{done.stderr.decode()[-3000:]}")
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, busy, json.loads(done.stdout)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    num_rows = arguments.rows
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    speeds: dict[str, list[float]] = {"bare": [], "with tokenizer": []}
    busy: dict[str, list[float]] = {name: [] for name in speeds}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        set_up(folder, num_rows)
        for round_ in range(arguments.rounds):
            for name, what in (("bare", folder / "rows.jsonl"), ("with tokenizer", folder / "config.yaml")):
                seconds, processor_seconds, said = measure(what)
                speeds[name].append(num_rows / seconds)
                busy[name].append(processor_seconds / num_rows * 1e6)
                print(f"round {round_ + 1}  {name:<15} {speeds[name][-1]:9,.0f} rows/s", flush=True)
        train = said["train"]
        assert isinstance(train, dict)
    print(f"\n{num_rows:,} rows, mean {train['lengths']['mean']:.0f} tokens, {cores} cores")
    print(f"\n{'':<15} {'rows/s':>9} {'lowest':>9} {'highest':>9} {'processor µs a row':>19}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<15} {median:9,.0f} {min(values):9,.0f} {max(values):9,.0f} {statistics.median(busy[name]):19.0f}"
        )
    print(f"\nwanted: {WANTED:,} rows/s")
    print_machine()


if __name__ == "__main__":
    main()
