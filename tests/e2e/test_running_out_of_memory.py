"""Runs that get too little memory: what they say took it, and that the change they name fits."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.errors import Preempted, RunError, WillFailAgain
from llmtrain.tracking.sinks import read_metrics
from llmtrain.training import step as step_of_the_loop
from llmtrain.verbs.train import train
from tests.support.worker_groups import GroupServer

pytestmark = pytest.mark.slow

MORE_THAN_ANY_MACHINE_HAS = 1 << 50


def refused_by_the_cpu() -> None:
    """The CPU allocator's own error."""
    torch.empty(MORE_THAN_ANY_MACHINE_HAS, dtype=torch.uint8)


def half_more_than_there_is() -> None:
    """The same, for half more than this machine has, which some machines would promise."""
    size = psutil.virtual_memory().total * 3 // 2
    raise RuntimeError(
        f"[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        f"allocate {size} bytes. Error code 12 (Cannot allocate memory)"
    )


def refused_by_cuda() -> None:
    """What CUDA's says, in its own words."""
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 3.10 GiB is "
        "free. Including non-PyTorch memory, this process has 76.14 GiB memory in use."
    )


@pytest.fixture
def refuse_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let the allocator refuse something after the backward pass of a step (from 1)."""
    compute = step_of_the_loop.compute_gradients

    def inject(step: int, refuse: Callable[[], None]) -> None:
        left = [step]

        def compute_and_refuse(*arguments: Any, **options: Any) -> torch.Tensor:
            loss = compute(*arguments, **options)
            left[0] -= 1
            if left[0] == 0:
                refuse()
            return loss

        monkeypatch.setattr(step_of_the_loop, "compute_gradients", compute_and_refuse)

    return inject


def size_of(row: str, message: str) -> list[float]:
    """The figures of a row of the table, in MB."""
    (found,) = re.findall(rf"^  +{row}  +(.*)$", message, re.MULTILINE)
    sizes = re.findall(r"([\d.]+) ([GM])B", found.replace(",", ""))
    return [float(number) * (1000 if unit == "G" else 1) for number, unit in sizes]


WIDE = ["model.d_model=256", "trainer.micro_batch_size=64", "trainer.max_steps=6", "trainer.save_every_steps=2"]


def test_an_allocator_that_refuses_ends_the_run_with_what_took_the_memory_and_a_change_that_fits(
    config_file: Path, refuse_at: Callable[[int, Callable[[], None]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    refuse_at(4, half_more_than_there_is)
    folder = config_file.parent / "runs" / "one"

    code = run(["train", str(config_file), "output.run_id=one", *WIDE])

    said = capsys.readouterr().err
    message = said[said.index("error: out of memory") :]
    assert code == WillFailAgain.exit_code
    assert "Traceback" not in said
    assert re.search(
        r"out of memory on cpu in step 4: [\d,.]+ GB more were requested; at most [\d.]+ [GM]B were held", message
    )
    parameters, gradients, state, rest = (
        size_of(row, message) for row in ("parameters", "gradients", "optimizer state", "the rest")
    )
    assert parameters[0] == parameters[1] == pytest.approx(8, abs=2)
    assert gradients[0] == parameters[0]  # the predicted peak is before there are any
    assert state[0] == state[1] == pytest.approx(2 * parameters[0], abs=0.2)
    assert rest[1] > size_of("activations", message)[0] > size_of("logits", message)[0] > 0
    together = size_of("total", message)[1]
    assert together == pytest.approx(sum(row[-1] for row in (parameters, gradients, state, rest)), abs=20)
    assert together < psutil.Process().memory_info().rss / 1e6 + 1000, (
        "this process has held more than a run of its own"
    )
    change = re.search(r"the cheapest change that fits: (trainer\S+ \S+) \([\d.]+ GB predicted, the batch", message)
    assert change
    micro, accumulation = (int(word.partition("=")[2]) for word in change[1].split())
    assert micro in (8, 16, 32)  # of 64; by how much else this machine holds
    assert micro * accumulation == 64
    assert message.strip().endswith(f"to go on: llmtrain train --resume {folder} {change[1]}")
    assert run(["train", "--resume", str(folder), *change[1].split()]) == 0


def test_a_run_without_a_checkpoint_starts_over(
    config_file: Path, refuse_at: Callable[[int, Callable[[], None]], None]
) -> None:
    refuse_at(2, half_more_than_there_is)
    with pytest.raises(WillFailAgain) as caught:
        train(load_config(str(config_file), ["trainer.micro_batch_size=8"]))

    assert re.search("to start over: train again with trainer.micro_batch_size=[124] ", str(caught.value))


def test_what_no_change_makes_fit_is_said(
    config_file: Path, refuse_at: Callable[[int, Callable[[], None]], None]
) -> None:
    refuse_at(2, refused_by_the_cpu)
    with pytest.raises(WillFailAgain, match=r"1,125,899\.91 GB more were requested") as caught:
        train(load_config(str(config_file)))

    assert str(caught.value).splitlines()[-1].startswith("smaller micro-batches, activation_checkpointing")


def test_the_words_of_cuda_are_read(config_file: Path, refuse_at: Callable[[int, Callable[[], None]], None]) -> None:
    refuse_at(2, refused_by_cuda)
    with pytest.raises(RunError, match=r"out of memory on cpu in step 2: 21\.47 GB more were requested"):
        train(load_config(str(config_file)))


def test_other_faults_of_torch_are_left_as_they_are(
    config_file: Path, refuse_at: Callable[[int, Callable[[], None]], None]
) -> None:
    def shapes() -> None:
        torch.ones(2) @ torch.ones(3)

    refuse_at(2, shapes)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        train(load_config(str(config_file)))


def test_a_model_that_does_not_fit_at_all_is_said_before_there_is_a_run(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtrain.training.setup.build.build_optimizer", lambda *_, **__: refused_by_the_cpu())

    assert run(["train", str(config_file)]) == WillFailAgain.exit_code

    said = capsys.readouterr().err
    assert "error: out of memory before the first step ([enforce fail" in said
    assert "see `llmtrain plan`" in said
    assert not (config_file.parent / "runs").exists()


def test_one_rank_that_has_too_little_says_so_and_the_others_can_be_resumed(
    config_file: Path, groups: GroupServer
) -> None:
    keys = ["output.run_id=two", "tracking.system_interval_sec=0.01"]
    group = groups.start(["train", str(config_file), *keys], world_size=2, faults="raise@step:ENOMEM:step=13:rank=1")

    assert group.wait() == [Preempted.exit_code, RunError.exit_code]

    said = group.stderr
    assert "[rank 1] error: out of memory on cpu in step 14: more was requested than there is" in said
    assert "the cheapest change that fits: trainer.micro_batch_size=2 trainer.grad_accum_steps=2" in said
    lines = read_metrics(config_file.parent / "runs" / "two" / "metrics.jsonl")
    figures = {name for line in lines for name in line}
    assert {"system/rss_gb", "system/rss_gb/rank_0", "system/rss_gb/rank_1"} <= figures, "each rank samples itself"
