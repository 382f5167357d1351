"""Preparing text beside datasets.map with a fast tokenizer: the source of Python's standard library, all cores.

    python -m benchmarks.prepare [--rounds 3]

A round runs each contestant once, in a process of its own; what is timed is the work without the imports. Ours is the
whole of `prepare` with a tokenizer that exists: finding and reading the files, hashing, trying out the fast encoder,
encoding, and shards that are on disk for good. Theirs is `map` alone, batched, over the same texts in a dataset that is
open already. In the end the tokens of every document are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.machine import print_machine

CONTESTANTS = ("ours", "datasets.map")
STDLIB = sysconfig.get_path("stdlib")
VOCAB_SIZE = 8192
WANTED = 4.0


def set_up(folder: Path) -> int:
    """The texts as a dataset, and a tokenizer of some of them; returns the bytes of the texts."""
    import datasets

    from llmtrain.data.tokenizers import train_bpe

    texts = []
    for file in sorted(Path(STDLIB).rglob("*.py")):
        if not {"site-packages", "dist-packages", "__pycache__"} & set(file.parts):
            try:
                text = file.read_bytes().decode("utf-8").removeprefix("\ufeff")
            except UnicodeDecodeError:
                continue
            if text.strip():
                texts.append(text)
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "texts"))
    train_bpe(texts[::8], vocab_size=VOCAB_SIZE).save(folder / "tokenizer")
    return sum(len(text.encode()) for text in texts)


def run_ours(folder: Path) -> tuple[float, Counter[str]]:
    """Seconds, and the hashes of the documents' tokens."""
    import pyarrow.parquet as pq

    from llmtrain.config.sections.schema import Config
    from llmtrain.data.prepare.token_shards import prepare
    from llmtrain.data.tokenizers import load_tokenizer

    section = {
        "input": STDLIB,
        "include": ["*.py"],
        "exclude": ["site-packages", "dist-packages", "__pycache__"],
        "tokenizer": {"kind": "hf", "path": str(folder / "tokenizer")},
        "output": str(folder / "shards"),
        "val_fraction": 0,
        "steps": [],
        "on_error": "skip",
    }
    config = Config.model_validate(
        {"prepare": section, "data": {"name": "tokens", "train": "x"}, "logging": {"level": "ERROR"}}
    )
    load_tokenizer(folder / "tokenizer").encode("what is imported late is imported here")
    began = time.perf_counter()
    prepare(config)
    seconds = time.perf_counter() - began
    rows = pq.read_table(folder / "shards" / "train", columns=["tokens"]).column("tokens")
    return seconds, Counter(_hash(row.values.to_numpy()[:-1]) for row in rows)


def run_theirs(folder: Path) -> tuple[float, Counter[str]]:
    """The same of datasets.map."""
    import datasets
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    texts = datasets.load_from_disk(str(folder / "texts"))
    datasets.disable_progress_bars()

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        encoded = tokenizer(batch["text"], add_special_tokens=False, split_special_tokens=True)
        return {"input_ids": encoded["input_ids"]}

    began = time.perf_counter()
    done = texts.map(encode, batched=True, num_proc=os.cpu_count(), remove_columns=["text"], load_from_cache_file=False)
    seconds = time.perf_counter() - began
    return seconds, Counter(_hash(row) for batch in done.with_format("numpy").iter(500) for row in batch["input_ids"])


def _hash(tokens: Any) -> str:
    return hashlib.sha256(tokens.astype("<u4").tobytes()).hexdigest()


def measure(name: str, folder: Path) -> tuple[float, dict[str, int]]:
    """Seconds of one contestant in a process of its own, and what it made."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false" if name == "datasets.map" else "true"}
    command = [sys.executable, "-m", "benchmarks.prepare", "--contestant", name, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return result["seconds"], result["tokens"]


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestant", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        name, folder = arguments.contestant
        seconds, tokens = (run_ours if name == "ours" else run_theirs)(Path(folder))
        print(json.dumps({"seconds": seconds, "tokens": tokens}))
        return
    with tempfile.TemporaryDirectory() as temporary:
        num_bytes = set_up(Path(temporary))
        speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
        made: dict[str, dict[str, int]] = {}
        for round_ in range(arguments.rounds):
            for name in CONTESTANTS:
                seconds, made[name] = measure(name, Path(temporary))
                speeds[name].append(num_bytes / 1e6 / seconds)
                print(f"round {round_ + 1}  {name:<14} {speeds[name][-1]:6.1f} MB/s", flush=True)
    assert made["ours"] == made["datasets.map"], "the tokens differ"
    ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
    print(
        f"\n{num_bytes / 1e6:.1f} MB, {os.cpu_count()} cores; the tokens of all {sum(made['ours'].values())} documents"
    )
    print(f"are the same\n\n{'':<14} {'MB/s':>7} {'lowest':>7} {'highest':>7}")
    for name, values in speeds.items():
        print(f"{name:<14} {statistics.median(values):7.1f} {min(values):7.1f} {max(values):7.1f}")
    each = ", ".join(f"{ratio:.1f}" for ratio in ratios)
    print(f"\nours is {statistics.median(ratios):.1f}× as fast (by round {each}); wanted: {WANTED:g}×")
    print_machine()


if __name__ == "__main__":
    main()
