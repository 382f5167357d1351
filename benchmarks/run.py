"""`make bench`: training speed beside transformers' Trainer, interleaved, medians of several rounds with their spread.

    python -m benchmarks.run [--rounds 3] [--steps 12]

A round runs each contestant once, in a process of its own, so that a slow minute of the machine hits all of them. The
first steps of a process, which compile and warm up, are not counted.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys

from benchmarks.machine import floor_of_benchmark, print_machine
from llmtrain.distributed.native_bf16 import computes_bf16

CONTESTANTS = ("ours", "trainer-bf16" if computes_bf16("cpu") else "trainer-fp32")
TOKENS_PER_STEP = 16 * 256
WARM_UP_STEPS = 3


def measure(name: str, steps: int) -> tuple[float, float]:
    """Median tokens/s of one process's steps, and its peak memory in GB."""
    command = [sys.executable, "-m", "benchmarks.contestants", name, str(steps + WARM_UP_STEPS)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return TOKENS_PER_STEP / statistics.median(result["seconds"][-steps:]), result["peak_memory_bytes"] / 1e9


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    speeds: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    memory: dict[str, float] = {}
    for round_ in range(arguments.rounds):
        for name in CONTESTANTS:
            speed, peak = measure(name, arguments.steps)
            speeds[name].append(speed)
            memory[name] = max(peak, memory.get(name, 0.0))
            print(f"round {round_ + 1}  {name:<16} {speed:8.0f} tok/s  {peak:.2f} GB", flush=True)
    ours = statistics.median(speeds["ours"])
    print(f"\n{'':<16} {'tok/s':>8} {'lowest':>8} {'highest':>8} {'peak GB':>8} {'ours is':>8}")
    for name, values in speeds.items():
        median = statistics.median(values)
        print(
            f"{name:<16} {median:8.0f} {min(values):8.0f} {max(values):8.0f} {memory[name]:8.2f} {ours / median:7.2f}×"
        )
    floor = floor_of_benchmark()
    print_machine(floor)
    print(f"a step of ours takes {TOKENS_PER_STEP / ours:.3f} s: {TOKENS_PER_STEP / ours / floor:.2f}× the floor")


if __name__ == "__main__":
    main()
