"""Measure what all that watches a run costs: metrics, sinks, machine sampler, live view, log file; 10 steps a second.

    python -m benchmarks.tracking [--seconds 20]

A step sleeps for what is left of its tenth of a second, so the processor time of the whole process, threads included,
is the cost, less that of the same loop with nothing on; a busy machine does not disturb it. Beside it: how long the
loop's own thread is held up, in wall time. The default config is what must stay below 1 %; the other rows are for
choosing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.machine import print_machine
from llmtrain.config.loading.load import plain_config
from llmtrain.config.sections.data import SyntheticConfig
from llmtrain.config.sections.schema import Config
from llmtrain.contracts import Batch
from llmtrain.data.tokens import open_training_data
from llmtrain.distributed.watchdog import Watchdog
from llmtrain.runs.events import EVENTS_NAME, EventLog
from llmtrain.tracking.logs import reset_logging, setup_logging
from llmtrain.tracking.machine_monitor import MachineMonitor
from llmtrain.tracking.progress import Progress
from llmtrain.tracking.sink_group import start_sinks
from llmtrain.tracking.slowdown import MachineCounters, Needs
from llmtrain.tracking.times import Spent
from llmtrain.training.cadence import NOT_LATE
from llmtrain.training.report import BatchLog, Compute, Outputs, Reporter
from llmtrain.training.slow_steps import SlowSteps
from llmtrain.training.state import RunState
from llmtrain.training.step import StepDone
from tests.support.terminal import terminal_as_stderr

STEPS_PER_SEC = 10
START_SEC = 10.0
"""Before the clock runs: sinks start, libraries load, MLflow makes its tables."""
WANTED_PERCENT, WANTED_SAMPLER_PERCENT = 1.0, 0.5
NOTHING = ("tracking.tensorboard.enabled=false", "tracking.system_interval_sec=0")
KINDS: dict[str, tuple[str, ...]] = {
    "default config": (),
    "figures of every step": ("trainer.log_every_steps=1",),
    "with MLflow (database)": ("tracking.mlflow.enabled=true",),
    "with W&B (offline)": ("tracking.wandb.enabled=true", "tracking.wandb.mode=offline"),
    "with both": ("tracking.mlflow.enabled=true", "tracking.wandb.enabled=true", "tracking.wandb.mode=offline"),
}
CPU = torch.device("cpu")


class Cost(NamedTuple):
    """Shares of the wall time, in percent."""

    processor: float
    held_up: float


def paced(step: Callable[[int], None], *, seconds: float) -> Cost:
    """Call `step` ten times a second; the process's processor time, and the wall time inside of the calls."""
    inside, began, busy = 0.0, time.perf_counter(), time.process_time()
    for number in range(1, round(seconds * STEPS_PER_SEC) + 1):
        time.sleep(max(0.0, began + number / STEPS_PER_SEC - time.perf_counter()))
        entered = time.perf_counter()
        step(number)
        inside += time.perf_counter() - entered
    wall = time.perf_counter() - began
    return Cost(100 * (time.process_time() - busy) / wall, 100 * inside / wall)


def watched(config: Config, folder: Path, *, seconds: float) -> Cost:
    """The loop with everything on that `config` asks for, as `train` puts it together, at a terminal."""
    run = folder / "run"
    (run / "logs").mkdir(parents=True)
    setup_logging(config.logging, run_folder=run, rank=0)
    state, total = RunState(), round(seconds * STEPS_PER_SEC)
    tokens = torch.zeros(8, 256, dtype=torch.int64)
    batches = [Batch(input_ids=tokens, labels=tokens)]
    sinks = start_sinks(
        config.tracking, run=run, config=config.model_dump(mode="json"), resumed_step=None, is_main=True
    )
    with ExitStack() as stack:
        tty = stack.enter_context(terminal_as_stderr(columns=100))
        interval = config.tracking.system_interval_sec
        monitor = stack.enter_context(MachineMonitor(run=run, device=CPU, interval_sec=interval))
        progress = stack.enter_context(Progress(total))
        report = Reporter(
            Outputs(sinks, EventLog(run / EVENTS_NAME), progress),
            compute=Compute(num_devices=1, flops_per_token=1e8, peak_flops=None, compiles=False, spent=Spent()),
            batches=BatchLog(config.logging.log_batches, own_items=list, total_steps=total),
            data=open_training_data(SyntheticConfig(num_items=10**9), seed=1),
            machine=monitor.take,
            advice={},
            watchdog=Watchdog(rank=0, world_size=1, timeout_sec=600),
            slow_steps=SlowSteps(MachineCounters(), needs=Needs(cores=1, processes=1, threads=1, on_cpu=True)),
        )

        def step(number: int) -> None:
            with report.spent("data"):
                pass
            with report.spent("step"):
                pass
            state.advance(range(8 * number, 8 * number + 8), num_tokens=2048)
            report.stepped(
                state,
                StepDone(loss_sum=2048 * 3.0 / number, num_tokens=2048, num_read=2048, grad_norm=0.8, late=NOT_LATE),
                lr=3e-4,
                items=range(8 * number, 8 * number + 8),
                micro_batches=batches,
                seconds=0.1,
                due=number % config.trainer.log_every_steps == 0,
            )
            if number % 100 == 0:
                report.evaluated(state, {"val/loss": 3.0, "val/perplexity": 20.0})
                report.saved(number, best=True)

        time.sleep(START_SEC)
        cost = paced(step, seconds=seconds)
        assert tty.raw.count("tok/s") > seconds, "the view was not drawn"
    sinks.finish({"state": "finished"})
    reset_logging()
    return cost


def sampler(folder: Path) -> float:
    """Processor time of one sample, over the default interval; in percent."""
    interval = plain_config([]).tracking.system_interval_sec
    monitor = MachineMonitor(run=folder, device=CPU, interval_sec=interval)
    samples = []
    for _ in range(200):
        began = time.thread_time()
        monitor.sample_now()
        samples.append(time.thread_time() - began)
    return 100 * statistics.mean(samples) / interval


def installed(keys: tuple[str, ...]) -> bool:
    """Return whether the tracker that `keys` turns on is there."""
    names = [key.split(".")[1] for key in keys if key.endswith("enabled=true")]
    return all(importlib.util.find_spec(name) for name in names)


def main() -> int:
    """Measure and print the table; 1 if it costs too much."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--only", choices=list(KINDS), help="one row")
    arguments = parser.parse_args()
    for name in ("CI", "KUBERNETES_SERVICE_HOST"):
        os.environ.pop(name, None)
    os.environ["TERM"] = "xterm-256color"
    costs: dict[str, Cost] = {}
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        idle = paced(lambda number: None, seconds=min(5.0, arguments.seconds))
        of_sampler = sampler(Path(temporary))
        kinds: Mapping[str, tuple[str, ...]] = {arguments.only: KINDS[arguments.only]} if arguments.only else KINDS
        for number, (name, keys) in enumerate(kinds.items()):
            if not installed(keys):
                continue
            cost = watched(plain_config(list(keys)), Path(temporary) / str(number), seconds=arguments.seconds)
            costs[name] = Cost(cost.processor - idle.processor, cost.held_up)
    print(f"{'':<24} {'processor time':>15} {'loop held up':>13}   of {1000 / STEPS_PER_SEC:.0f} ms a step")
    for name, cost in costs.items():
        print(f"{name:<24} {cost.processor:13.2f} % {cost.held_up:11.2f} %")
    print(f"{'machine sampler alone':<24} {of_sampler:13.3f} %")
    print(f"wanted: below {WANTED_PERCENT} % in the default config, the sampler below {WANTED_SAMPLER_PERCENT} %")
    print_machine()
    too_much = any(cost.processor >= WANTED_PERCENT for name, cost in costs.items() if name == "default config")
    return int(too_much or of_sampler >= WANTED_SAMPLER_PERCENT)


if __name__ == "__main__":
    raise SystemExit(main())
