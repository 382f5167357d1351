"""Several processes beside one: speed, what Fabric costs, and how long a step waits for a save under FSDP.

    python -m benchmarks.scaling [--rounds 3] [--steps 8] [--only speed,fabric,saving]

speed    14m.yaml at a global batch of 16 × 256: one process of one core, DDP and FSDP on two of one core each. Every
         contestant runs in processes of its own, through `llmtrain train`, which are given as many cores and a thread
         each; the first steps, which compile and warm up, are not counted.
fabric   steps of the same decoder, called bare and through the engine, in turn, in one process.
saving   two ranks with 14m.yaml's decoder cut over them: a save, and a save that is waited for, in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.machine import print_machine
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.training import DistributedConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.tracking.sinks import read_metrics
from llmtrain.training.checkpoint import CheckpointStore, Snapshot, step_folder
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.setup.trained import Trained, Vocabulary, train_decoder
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update
from tests.support.ranks import RankPool

CONFIG = Path(__file__).with_name("14m.yaml")
ROWS, LENGTH, VOCAB = 16, 256, 8192
WARM_UP_STEPS = 3
WAYS = {"1 process": ("single", 1), "2, ddp": ("ddp", 2), "2, fsdp": ("fsdp", 2)}
COMPUTE_SECONDS = 2.0
"""Training between two saves, in which the one under way is written."""


# -- speed -------------------------------------------------------------------------------------------------------------


def tokens_per_sec(strategy: str, num_processes: int, steps: int) -> float:
    """Return the tokens/s of one run, by the median of its steps."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < num_processes:
        raise SystemExit(f"{num_processes} processes of one core each need as many cores; there are {len(cores)}")
    with tempfile.TemporaryDirectory() as folder:
        keys = [
            f"trainer.max_steps={steps + WARM_UP_STEPS}",
            f"trainer.micro_batch_size={ROWS // num_processes}",
            f"trainer.global_batch_size={ROWS}",
            f"distributed.strategy={strategy}",
            f"output.root_dir={folder}",
            "output.run_id=run",
        ]
        command = [sys.executable, "-m", "llmtrain", "train", str(CONFIG), *keys]
        command += ["--nproc", str(num_processes)] if num_processes > 1 else []
        done = subprocess.run(
            command,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            preexec_fn=lambda: os.sched_setaffinity(0, cores[:num_processes]),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{strategy} failed:\n{done.stderr[-3000:]}")
        lines = read_metrics(Path(folder) / "run" / "metrics.jsonl")
    seconds = [line["train/step_time_sec"] for line in lines if "train/step_time_sec" in line]
    return float(ROWS * LENGTH / statistics.median(seconds[-steps:]))


def speed(rounds: int, steps: int) -> None:
    """Measure the contestants in turn, and print their medians."""
    found: dict[str, list[float]] = {name: [] for name in WAYS}
    for round_, (name, way) in itertools.product(range(rounds), WAYS.items()):
        found[name].append(tokens_per_sec(*way, steps))
        print(f"round {round_ + 1}  {name:<10} {found[name][-1]:8.0f} tok/s", flush=True)
    one = statistics.median(found["1 process"])
    print(f"\n{'':<10} {'tok/s':>8} {'lowest':>8} {'highest':>8} {'over one':>9}")
    for name, values in found.items():
        median = statistics.median(values)
        print(f"{name:<10} {median:8.0f} {min(values):8.0f} {max(values):8.0f} {median / one:8.2f}×")


# -- fabric ------------------------------------------------------------------------------------------------------------


def fabric(steps: int) -> None:
    """Measure steps of both kinds in turn, and print what the engine adds."""
    engine = make_engine()
    bare_model, bare_optimizer = make_model()
    raw, optimizer = make_model()
    model = engine.setup(raw)
    dtype = torch.bfloat16 if engine.resolved.precision == "bf16-mixed" else torch.float32

    def bare_step(batch: Batch) -> None:
        with torch.autocast("cpu", dtype, enabled=dtype is torch.bfloat16):
            loss_sum, num_tokens = bare_model(batch)
        (loss_sum / num_tokens).backward()
        loss_sum.item()
        update(bare_optimizer, grad_norm=gradient_norm(bare_optimizer), max_grad_norm=1.0)
        bare_optimizer.zero_grad()

    def our_step(batch: Batch) -> None:
        num_tokens = agree([batch], engine=engine, stop_requested=False).num_tokens
        compute_gradients(model, [batch], engine=engine, num_tokens=num_tokens)
        update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
        optimizer.zero_grad()

    kinds: list[Callable[[Batch], None]] = [bare_step, our_step]
    seconds: list[list[float]] = [[], []]
    for step in range(2 * (steps + WARM_UP_STEPS)):
        batch, kind = batch_of(step // 2), (step + step // 2) % 2  # neither is always the second
        began = time.perf_counter()
        kinds[kind](batch)
        seconds[kind].append(time.perf_counter() - began)
    bare, ours = (statistics.median(of_kind[WARM_UP_STEPS:]) for of_kind in seconds)
    print(f"a bare step takes {bare * 1000:.1f} ms, one through the engine {ours * 1000:.1f}: {ours / bare - 1:+.1%}")


def make_engine(strategy: str | None = None) -> Engine:
    """Make the engine of 14m.yaml, on this process or the pool's."""
    config = load_config(str(CONFIG), ["run.device=cpu"]).config
    distributed = DistributedConfig(timeout_sec=60)
    resolved = resolve(config.run, config.trainer, distributed)
    return Engine(dataclasses.replace(resolved, strategy=strategy or resolved.strategy), distributed=distributed)


def make_model() -> tuple[Decoder, NamedOptimizer]:
    """14m.yaml's decoder, compiled, and its optimizer."""
    config = load_config(str(CONFIG)).config
    torch.manual_seed(0)
    decoder = Decoder(config.decoder(wanted_by="the benchmark"), VOCAB)
    decoder.compile_parts()
    return decoder, build_optimizer(config.optimizer, decoder)


def batch_of(step: int) -> Batch:
    """Random rows."""
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


# -- saving ------------------------------------------------------------------------------------------------------------


def saving(rounds: int) -> None:
    """Measure both kinds of save in turn on two ranks, and print the longest of the ranks' medians."""
    folder = Path(tempfile.mkdtemp())
    try:
        with RankPool(2) as pool:
            of_ranks = pool.run(saves, folder, rounds)
    finally:
        shutil.rmtree(folder)
    stall, wait = (max(statistics.median(of_rank[kind]) for of_rank in of_ranks) for kind in (0, 1))
    print(f"under fsdp a step waits {stall * 1000:.0f} ms for a save, a synchronous one takes {wait * 1000:.0f} ms:")
    print(f"{stall / wait:.1%} of it")


def saves(folder: Path, rounds: int) -> tuple[list[float], list[float]]:
    """Return for one rank the seconds that training waits for a save, and for one until it is on the disk."""
    engine = make_engine("fsdp")
    config = load_config(str(CONFIG)).config
    torch.manual_seed(0)
    trained: Trained = train_decoder(
        config.decoder(wanted_by="the benchmark"), Vocabulary(size=VOCAB, tokenizer_folder=None, eos_id=0), sharded=True
    )
    model = engine.setup(trained.module)
    trained.initialize()
    optimizer = build_optimizer(config.optimizer, trained.module)
    rows: Any = {name: cast(torch.Tensor, tensor)[:2] for name, tensor in batch_of(0).items()}
    compute_gradients(model, [rows], engine=engine, num_tokens=1)
    update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)  # now it has its moments
    group = engine.save_group()
    assert group is not None
    store = CheckpointStore(
        folder,
        keep_last=2,
        config_yaml="",
        write_model=trained.write,
        resumed_from=step_folder(folder, 0),
        group=group,
        split=trained.split,
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(2 * (rounds + 1)):
        snapshot = Snapshot(step=number + 1, state={}, model=trained.tensors(), optimizer=optimizer.state_tensors())
        engine.gather(0)
        began = time.perf_counter()
        store.save(snapshot)
        if number % 2:
            store.wait()
        seconds[number % 2].append(time.perf_counter() - began)
        compute(COMPUTE_SECONDS)
        store.wait()
    store.close()
    return seconds[0][1:], seconds[1][1:]  # the first ones' memory is fresh


def compute(seconds: float) -> None:
    """Keep this rank's core busy, as a step does."""
    a, until = torch.randn(512, 512), time.perf_counter() + seconds
    while time.perf_counter() < until:
        a @ a


def main() -> None:
    """Measure and print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="speed,fabric,saving")
    arguments = parser.parse_args()
    wanted = arguments.only.split(",")
    if "speed" in wanted:
        speed(arguments.rounds, arguments.steps)
    if "fabric" in wanted:
        fabric(arguments.steps)
    if "saving" in wanted:
        saving(arguments.rounds)
    print_machine()


if __name__ == "__main__":
    main()
