"""Measure how long a training step waits for a save, and how long the save takes: a 14M decoder with AdamW's state.

    python -m benchmarks.saving [--rounds 7]

The first save of each kind, whose memory is fresh, is not counted.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import print_machine
from llmtrain.training.checkpoint import CheckpointStore, Snapshot

NUM_TENSORS, SHAPE = 36, (384, 1024)
COMPUTE_SECONDS = 2.0
"""Training between two saves, in which the one under way is written."""


def write_model(folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write what a model folder costs: one file of tensors."""
    save_file(dict(weights), folder / "model.safetensors")


def compute(seconds: float) -> None:
    """Keep all cores busy, as a step does."""
    a, until = torch.randn(1024, 1024), time.perf_counter() + seconds
    while time.perf_counter() < until:
        a @ a


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    model = {f"w{i}": torch.randn(SHAPE) for i in range(NUM_TENSORS)}
    optimizer = {f"w{i}/{key}": torch.randn(SHAPE) for i in range(NUM_TENSORS) for key in ("exp_avg", "exp_avg_sq")}
    megabytes = 3 * NUM_TENSORS * SHAPE[0] * SHAPE[1] * 4 / 1e6
    folder = Path(tempfile.mkdtemp())
    stalls: list[float] = []
    waits: list[float] = []
    try:
        store = CheckpointStore(folder, keep_last=2, config_yaml="run: {}\n", write_model=write_model)
        for step in range(2 * (rounds + 1)):
            snapshot = Snapshot(step=step + 1, state={"step": step}, model=model, optimizer=optimizer)
            began = time.perf_counter()
            store.save(snapshot)
            if step % 2:
                store.wait()
            (waits if step % 2 else stalls).append(time.perf_counter() - began)
            compute(COMPUTE_SECONDS)
            store.wait()
        store.close()
    finally:
        shutil.rmtree(folder)
    stall, wait = statistics.median(stalls[1:]), statistics.median(waits[1:])
    print(f"{megabytes:.0f} MB; a step waits {stall * 1000:.0f} ms (longest {max(stalls[1:]) * 1000:.0f}) for a save,")
    print(f"a synchronous save takes {wait * 1000:.0f} ms: {stall / wait:.1%} of it")
    print_machine()


if __name__ == "__main__":
    main()
