"""Reading tokens: the loader alone, and how long a run takes to find its place in the data when it goes on.

    python -m benchmarks.data [--rounds 5]

The loader reads shards with row groups of 1M tokens, in the shuffled order of a run, into micro-batches of tensors. The
place is looked for at many points of 10 billion simulated tokens, without files: from nothing to the windows of a step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.machine import print_machine
from llmtrain.config.sections.data import TokensConfig
from llmtrain.data.manifest import Counts, Manifest, TokenizerRecord, write_manifest
from llmtrain.data.order import ItemOrder, WindowOrder
from llmtrain.data.prepare.shard_writer import ShardWriter
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.tokens import open_training_data

NUM_TOKENS = 40_000_000
SIMULATED_TOKENS = 10_000_000_000
WANTED_SPEED = 2e6
WANTED_SEEK_SEC = 0.3


def write_shards(folder: Path) -> None:
    """Documents of random tokens; more than are kept in memory as a whole."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, name="train", dtype=np.dtype(np.uint16), shard_size=10_000_000, keep_text=False)
    written = 0
    while written < NUM_TOKENS:
        tokens = rng.integers(1, 50_000, int(rng.integers(200, 3000)), dtype=np.uint16)
        tokens[-1] = 0
        writer.add("random", tokens=tokens, num_bytes=len(tokens), text="")
        written += len(tokens)
    split = writer.close()
    counts = Counts(read=split.documents, train=split.documents, val=0, dropped=0, empty=0, errors=0)
    tokenizer = TokenizerRecord(kind="bpe", path="tokenizer", sha256="0" * 64, vocab_size=50_000, eos_id=0)
    manifest = Manifest(
        tool_version="benchmark",
        options={},
        inputs=(),
        tokenizer=tokenizer,
        token_dtype="uint16",
        counts=counts,
        splits={"train": split},
    )
    write_manifest(folder, manifest)


def loader_speed(folder: Path, seq_len: int) -> float:
    """Tokens/s of batches of 16 windows, after the first few."""
    data = open_training_data(TokensConfig(train=str(folder / "train"), seq_len=seq_len), seed=1)
    num_steps, warm_up = 12_000_000 // (16 * seq_len), 20
    batches = data.batches(start_item=0, batch_size=16, end_item=16 * (num_steps + warm_up), micro_batch_size=16)
    with closing(batches):
        for step, _ in enumerate(batches):
            if step + 1 == warm_up:
                began = time.perf_counter()
    return num_steps * 16 * seq_len / (time.perf_counter() - began)


def longest_seek(seq_len: int) -> float:
    """Seconds to the windows of a step of 512 items; the longest at ten points in three epochs."""
    per_file = [1_000_000] * 50
    stream = TokenStream.of([(Path(f"shard_{index}"), per_file) for index in range(SIMULATED_TOKENS // sum(per_file))])
    windows = ShardWindows(stream, seq_len)
    longest = 0.0
    for item in np.linspace(0, 3 * windows.num_windows, 10).astype(int).tolist():
        began = time.perf_counter()
        order = WindowOrder(windows.num_windows, seq_len=seq_len, shuffle_chunks=8, seed=1, source=0)
        windows.open(order)
        places = ItemOrder([order], weights=None, seed=1).locate(np.arange(item, item + 512))
        stream.find(places.sequence * seq_len)
        longest = max(longest, time.perf_counter() - began)
    return longest


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    print(f"{'tokens a window':<16} {'M tokens/s':>11} {'lowest':>7} {'highest':>8} {'longest seek':>13}")
    with tempfile.TemporaryDirectory() as temporary:
        write_shards(Path(temporary))
        for seq_len in (256, 1024):
            speeds = [loader_speed(Path(temporary), seq_len) / 1e6 for _ in rounds]
            seek = statistics.median(longest_seek(seq_len) for _ in rounds)
            print(
                f"{seq_len:<16} {statistics.median(speeds):11.1f} {min(speeds):7.1f} {max(speeds):8.1f} "
                f"{1000 * seek:10.0f} ms"
            )
    print(f"\nwanted: {WANTED_SPEED / 1e6:g} M tokens/s, {1000 * WANTED_SEEK_SEC:g} ms")
    print_machine()


if __name__ == "__main__":
    main()
