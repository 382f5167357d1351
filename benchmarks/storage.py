"""Reading from an object store: small ranges by obstore and by s3fs, and a loader beside those of others.

    python -m benchmarks.storage [--rounds 5]

The store is moto's server on this machine, in a process of its own. Ranges: 64 KiB at random places of one object, one
after the other and 64 at once, each client by its own call for several. Loaders: windows of 1,024 tokens in shuffled
order from a cold cache, each from its own format. A round runs each contestant once, in a process of its own; what is
timed is the work without the imports. s3fs and litdata are no dependencies: what is not installed is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data import write_shards
from benchmarks.machine import print_machine

BUCKET = "benchmark"
OBJECT_BYTES, RANGE_BYTES, NUM_RANGES, AT_ONCE = 1 << 26, 1 << 16, 512, 64
SEQ_LEN, BATCH, NUM_TOKENS = 1024, 16, 10_000_000


def obstore_ranges(at_once: int, _: Path) -> float:
    """Ranges a second, by the storage room."""
    from llmtrain.storage.store import open_store

    store = open_store(f"s3://{BUCKET}")
    return _ranges_per_sec(at_once, lambda ranges: store.read_ranges("object", ranges))


def s3fs_ranges(at_once: int, _: Path) -> float:
    """The same by s3fs, without its cache."""
    import s3fs

    files = s3fs.S3FileSystem(endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    path = f"{BUCKET}/object"

    def read(ranges: list[tuple[int, int]]) -> list[bytes]:
        starts = [start for start, _ in ranges]
        ends = [start + length for start, length in ranges]
        found: list[bytes] = files.cat_ranges([path] * len(ranges), starts, ends)
        return found

    return _ranges_per_sec(at_once, read)


def _ranges_per_sec(at_once: int, read: Callable[[list[tuple[int, int]]], list[bytes]]) -> float:
    places = random.Random(0)
    num_ranges = NUM_RANGES if at_once > 1 else NUM_RANGES // 4
    ranges = [(places.randrange(OBJECT_BYTES - RANGE_BYTES), RANGE_BYTES) for _ in range(num_ranges)]
    read(ranges[:1])
    began = time.perf_counter()
    for first in range(0, num_ranges, at_once):
        found = read(ranges[first : first + at_once])
        assert all(len(content) == RANGE_BYTES for content in found)
    return num_ranges / (time.perf_counter() - began)


def our_loader(_: int, work: Path) -> float:
    """Tokens/s of batches, from opening the address on."""
    from llmtrain.config.sections.data import TokensConfig
    from llmtrain.data.tokens import open_training_data

    config = TokensConfig(train=f"s3://{BUCKET}/shards/train", seq_len=SEQ_LEN, cache_dir=str(work / "ours"))
    items = NUM_TOKENS // SEQ_LEN // BATCH * BATCH
    began = time.perf_counter()
    data = open_training_data(config, seed=1)
    with closing(data.batches(start_item=0, batch_size=BATCH, end_item=items, micro_batch_size=BATCH)) as batches:
        num_batches = sum(1 for _ in batches)
    return num_batches * BATCH * SEQ_LEN / (time.perf_counter() - began)


def datasets_loader(_: int, work: Path) -> float:
    """Tokens/s of datasets' streaming over the same Parquet files, packed into windows as its users do."""
    import datasets
    import torch

    options = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    began = time.perf_counter()
    rows = datasets.load_dataset(
        "parquet",
        data_files=f"s3://{BUCKET}/shards/train/*.parquet",
        split="train",
        streaming=True,
        storage_options=options,
        columns=["tokens"],
    )
    seen, held = 0, np.empty(0, np.int64)
    for batch in rows.shuffle(seed=1, buffer_size=1000).with_format("numpy").iter(batch_size=64):
        held = np.concatenate([held, *batch["tokens"]])
        while len(held) > BATCH * (SEQ_LEN + 1):
            window, held = held[: BATCH * (SEQ_LEN + 1)], held[BATCH * (SEQ_LEN + 1) :]
            seen += torch.from_numpy(window.reshape(BATCH, SEQ_LEN + 1)).shape[0] * SEQ_LEN
        if seen >= NUM_TOKENS:
            break
    return seen / (time.perf_counter() - began)


def litdata_loader(_: int, work: Path) -> float:
    """Tokens/s of litdata's StreamingDataset over its own chunks of the same tokens."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    began = time.perf_counter()
    windows = litdata.StreamingDataset(
        input_dir=f"s3://{BUCKET}/chunks",
        cache_dir=str(work / "litdata"),
        item_loader=TokensLoader(block_size=SEQ_LEN + 1),
        shuffle=True,
        seed=1,
        storage_options={"endpoint_url": os.environ["AWS_ENDPOINT_URL"]},
    )
    seen = 0
    for batch in litdata.StreamingDataLoader(windows, batch_size=BATCH, num_workers=0):
        seen += batch.shape[0] * SEQ_LEN
        if seen >= NUM_TOKENS:
            break
    return seen / (time.perf_counter() - began)


CONTESTANTS: dict[str, tuple[str, Callable[[int, Path], float], int, str | None]] = {
    "obstore, one range at a time": ("ranges/s", obstore_ranges, 1, None),
    "s3fs, one range at a time": ("ranges/s", s3fs_ranges, 1, "s3fs"),
    "obstore, 64 at once": ("ranges/s", obstore_ranges, AT_ONCE, None),
    "s3fs, 64 at once": ("ranges/s", s3fs_ranges, AT_ONCE, "s3fs"),
    "our loader": ("tokens/s", our_loader, 0, None),
    "datasets, streaming": ("tokens/s", datasets_loader, 0, "s3fs"),
    "litdata": ("tokens/s", litdata_loader, 0, "litdata"),
}
"""Name: unit, function, ranges at once, and the package that it needs."""


def serve(port: Any, done: Any) -> None:
    """Serve S3 until `done`; the process that calls it does nothing else."""
    from tests.support.moto_s3 import LocalS3

    with LocalS3() as server:
        server.make_bucket(BUCKET)
        port.put(server.environment)
        done.wait()
        os._exit(0)  # threads with open connections would go on


def fill(work: Path) -> None:
    """Write one large object, token shards, and the same tokens in litdata's format where it is installed."""
    from llmtrain.storage.store import open_store

    store = open_store(f"s3://{BUCKET}")
    store.write("object", os.urandom(OBJECT_BYTES))
    store.write("shards/tokenizer/tokenizer_config.json", b"{}")  # nobody encodes with it
    write_shards(work / "shards")
    folders = [work / "shards"]
    if importlib.util.find_spec("litdata"):
        subprocess.run([sys.executable, "-m", "benchmarks.storage", "--chunks", str(work)], check=True)
        folders.append(work / "chunks")
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                store.write(path.relative_to(work).as_posix(), path)


def write_chunks(work: Path) -> None:
    """Write the tokens of the shards as litdata's chunks."""
    import litdata
    from litdata.streaming.item_loader import TokensLoader

    litdata.optimize(
        fn=_documents,
        inputs=sorted(str(path) for path in (work / "shards" / "train").glob("*.parquet")),
        output_dir=str(work / "chunks"),
        chunk_size=(SEQ_LEN + 1) * 2048,
        item_loader=TokensLoader(block_size=SEQ_LEN + 1),
        num_workers=1,
    )


def _documents(path: str) -> Any:
    import pyarrow.parquet as pq
    import torch

    for row in pq.read_table(path, columns=["tokens"]).column("tokens"):
        yield torch.from_numpy(row.values.to_numpy().astype(np.int32))


def measure(name: str) -> float:
    """Run one contestant in a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "LLMTRAIN_CACHE": cache, "HF_HOME": cache, "HF_DATASETS_CACHE": cache}
        command = [sys.executable, "-m", "benchmarks.storage", "--contestant", name, cache]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return float(json.loads(done.stdout.strip().splitlines()[-1]))


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--contestant", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--chunks", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.chunks:
        write_chunks(arguments.chunks)
        return
    if arguments.contestant:
        _, contestant, at_once, _ = CONTESTANTS[arguments.contestant[0]]
        print(json.dumps(contestant(at_once, Path(arguments.contestant[1]))))
        return
    context = multiprocessing.get_context("spawn")
    environment, done = context.Queue(), context.Event()
    server = context.Process(target=serve, args=(environment, done))
    server.start()
    os.environ.update(environment.get(), AWS_ALLOW_HTTP="true")  # litdata's client asks for the latter
    installed = {
        name: needs is None or bool(importlib.util.find_spec(needs)) for name, (*_, needs) in CONTESTANTS.items()
    }
    found: dict[str, list[float]] = {name: [] for name, here in installed.items() if here}
    try:
        with tempfile.TemporaryDirectory() as work:
            fill(Path(work))
        for _ in range(arguments.rounds):
            for name, values in found.items():
                values.append(measure(name))
    finally:
        done.set()
        server.join()
    print(f"{'':<30} {'median':>12} {'lowest':>12} {'highest':>12}")
    for name, values in found.items():
        unit = CONTESTANTS[name][0]
        print(f"{name:<30} {statistics.median(values):12,.0f} {min(values):12,.0f} {max(values):12,.0f} {unit}")
    for name, here in installed.items():
        if not here:
            print(f"{name:<30} not installed: {CONTESTANTS[name][3]}")
    print_machine()


if __name__ == "__main__":
    main()
