"""Reading tokens: the loader alone, and how long a run takes to find its place in the data when it goes on.

    python -m benchmarks.data [--rounds 5]

The loader reads shards as `prepare` writes them, in the shuffled order of a run, into micro-batches of tensors. Its
first batch is timed at many points of the order, in a loader of its own each time. The place is looked for at many
points of 10 billion simulated tokens, without files: from nothing to the windows of a step. Opening reads a manifest of
as many tokens and looks at the sizes of their files, which are sparse.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from contextlib import closing
from pathlib import Path

import numpy as np

from benchmarks.machine import print_machine
from llmtrain.config.sections.data import TokensConfig
from llmtrain.data.manifest import Counts, Manifest, RowGroups, Shard, Split, TokenizerRecord, write_manifest
from llmtrain.data.mixture import ItemOrder
from llmtrain.data.order import WindowOrder
from llmtrain.data.prepare.shard_plan import ROW_GROUP_TOKENS, PlannedShard, ShardPlan
from llmtrain.data.prepare.shard_writer import ShardWriter, document_table, write_encoded
from llmtrain.data.shards import ShardWindows, TokenStream
from llmtrain.data.sources import open_source
from llmtrain.data.tokens import open_training_data

NUM_TOKENS = 40_000_000
SIMULATED_TOKENS = 10_000_000_000
SHARD_TOKENS = 3_000_000
WANTED_SPEED = 2e6
WANTED_SEEK_SEC = 0.3


def write_shards(folder: Path) -> None:
    """Documents of random tokens; more than are kept in memory as a whole."""
    rng = np.random.default_rng(0)
    work = folder / "work"
    work.mkdir(parents=True)
    plan = ShardPlan("train", shard_size=SHARD_TOKENS)
    planned: list[PlannedShard] = []
    written = 0
    while written < NUM_TOKENS:
        documents = [rng.integers(1, 50_000, int(length), np.uint16) for length in rng.integers(200, 3000, 1000)]
        for tokens in documents:
            tokens[-1] = 0
        name, lengths = f"{written}.arrow", [len(tokens) for tokens in documents]
        write_encoded(work, name, document_table(["random"] * len(documents), documents, dtype="uint16"))
        planned += plan.add(name, lengths=lengths, num_bytes=lengths)
        written += sum(lengths)
    shards = tuple(ShardWriter(folder, work)(shard) for shard in planned + plan.close())
    shutil.rmtree(work)
    rows = sum(shard.rows for shard in shards)
    write_manifest(folder, manifest_of(Split(documents=rows, tokens=written, bytes=written, shards=shards)))


def manifest_of(split: Split) -> Manifest:
    """Return a manifest of the split alone."""
    counts = Counts(read=split.documents, train=split.documents, val=0, dropped=0, empty=0, errors=0)
    tokenizer = TokenizerRecord(kind="bpe", path="tokenizer", sha256="0" * 64, vocab_size=50_000, eos_id=0)
    return Manifest(
        tool_version="benchmark",
        options={},
        inputs=(),
        tokenizer=tokenizer,
        token_dtype="uint16",
        counts=counts,
        splits={"train": split},
    )


def write_sparse_shards(folder: Path) -> None:
    """Write a manifest of SIMULATED_TOKENS tokens, and files that have the sizes and nothing else."""
    (folder / "train").mkdir()
    num_groups = SHARD_TOKENS // ROW_GROUP_TOKENS
    tokens = tuple(ROW_GROUP_TOKENS - 37 * index % 500 for index in range(num_groups))
    row_groups = RowGroups(documents=(60,) * num_groups, tokens=tokens, bytes=tuple(4 * count for count in tokens))
    shards = []
    for number in range(SIMULATED_TOKENS // sum(tokens)):
        path = f"train/shard_{number:05}.parquet"
        with (folder / path).open("wb") as file:
            file.truncate(SHARD_TOKENS)
        shards.append(
            Shard(
                path=path,
                size=SHARD_TOKENS,
                sha256=f"{number:064x}",
                rows=60 * num_groups,
                tokens=sum(tokens),
                bytes=4 * sum(tokens),
                row_groups=row_groups,
            )
        )
    num_tokens = sum(shard.tokens for shard in shards)
    split = Split(
        documents=60 * num_groups * len(shards), tokens=num_tokens, bytes=4 * num_tokens, shards=tuple(shards)
    )
    write_manifest(folder, manifest_of(split))


def opening(folder: Path) -> float:
    """Seconds to open the sparse shards."""
    began = time.perf_counter()
    open_source(str(folder / "train"), key="data.train")
    return time.perf_counter() - began


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


def longest_access(folder: Path, seq_len: int) -> float:
    """Seconds to the first batch of 16 windows of a new loader; the longest at ten points of the epoch."""
    data = open_training_data(TokensConfig(train=str(folder / "train"), seq_len=seq_len), seed=1)
    longest = 0.0
    for item in np.linspace(0, data.items_per_epoch - 16, 10).astype(int).tolist():
        began = time.perf_counter()
        with closing(data.batches(start_item=item, batch_size=16, end_item=item + 16, micro_batch_size=16)) as batches:
            next(batches)
        longest = max(longest, time.perf_counter() - began)
    return longest


def longest_seek(seq_len: int) -> float:
    """Seconds to the windows of a step of 512 items; the longest at ten points in three epochs."""
    per_file = [ROW_GROUP_TOKENS] * (SHARD_TOKENS // ROW_GROUP_TOKENS)
    stream = TokenStream.of([(Path(f"shard_{index}"), per_file) for index in range(SIMULATED_TOKENS // sum(per_file))])
    windows = ShardWindows(stream, seq_len)
    longest = 0.0
    for item in np.linspace(0, 3 * windows.num_windows, 10).astype(int).tolist():
        began = time.perf_counter()
        order = WindowOrder(windows.num_windows, seq_len=seq_len, shuffle_chunks=8, seed=1, source=0)
        windows.open(order)
        places = ItemOrder([order], None, seed=1).locate(np.arange(item, item + 512))
        stream.find(places.sequence * seq_len)
        longest = max(longest, time.perf_counter() - began)
    return longest


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = range(parser.parse_args().rounds)
    columns = f"{'M tokens/s':>11} {'lowest':>7} {'highest':>8} {'longest seek':>13} {'first batch':>12}"
    print(f"{'tokens a window':<16} {columns}")
    with tempfile.TemporaryDirectory() as temporary:
        write_shards(Path(temporary))
        for seq_len in (256, 1024):
            speeds = [loader_speed(Path(temporary), seq_len) / 1e6 for _ in rounds]
            access = statistics.median(longest_access(Path(temporary), seq_len) for _ in rounds)
            seek = statistics.median(longest_seek(seq_len) for _ in rounds)
            print(
                f"{seq_len:<16} {statistics.median(speeds):11.1f} {min(speeds):7.1f} {max(speeds):8.1f} "
                f"{1000 * seek:10.0f} ms {1000 * access:9.0f} ms"
            )
    with tempfile.TemporaryDirectory() as temporary:
        write_sparse_shards(Path(temporary))
        opened = statistics.median(opening(Path(temporary)) for _ in rounds)
    print(f"\nopening 10 billion tokens takes {1000 * opened:.0f} ms")
    print(f"\nwanted: {WANTED_SPEED / 1e6:g} M tokens/s, {1000 * WANTED_SEEK_SEC:g} ms")
    print_machine()


if __name__ == "__main__":
    main()
