"""The comparisons of the GPU benchmark find what is wrong, and say so where a comparison would say nothing."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.gpu import correctness, llama, peers, speeds
from benchmarks.gpu.__main__ import SHARES, TOTAL_SECONDS, WITH_CHECKS
from benchmarks.gpu.document import Recorder, write_document
from benchmarks.gpu.motifs import END, Motifs
from benchmarks.gpu.setting import Setting
from benchmarks.gpu.small_runs import SmallRun, difference, packed_batch, write_config
from benchmarks.gpu.steps import StepClock, what_was_seen
from benchmarks.gpu.wheels import collect, install_missing
from llmtrain.config.loading.load import load_config
from llmtrain.models.decoder.decoder import Decoder


@pytest.fixture
def setting(tmp_path: Path) -> Setting:
    return Setting(smoke=True, work=tmp_path, recorder=Recorder(tmp_path / "gpu.json", "any"))


def a_run(*losses: float) -> SmallRun:
    return SmallRun(folder=Path(), losses=dict(enumerate(losses, start=1)), summary={})


def test_runs_differ_by_their_worst_step() -> None:
    assert difference(a_run(4.0, 3.0, 2.0), a_run(4.0, 3.3, 2.0)) == pytest.approx(0.1)
    assert difference(a_run(4.0, 2.0), a_run(4.0, 2.0)) == 0.0
    assert np.isnan(difference(a_run(4.0, 2.0), a_run(float("nan"), 2.0)))


@pytest.mark.parametrize("other", [a_run(4.0), a_run()], ids=["fewer steps", "none"])
def test_runs_of_other_steps_are_not_compared(other: SmallRun) -> None:
    with pytest.raises(AssertionError, match="steps of the runs"):
        difference(a_run(4.0, 2.0), other)


def test_runs_that_learn_nothing_are_not_compared() -> None:
    with pytest.raises(AssertionError, match="learn nothing"):
        difference(a_run(4.0, 3.99), a_run(4.0, 3.99))


def test_documents_that_see_each_other_fail_the_check(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = correctness.Checks(setting)
    assert checks.packed("decoder", torch.float32) < correctness.FLOAT32

    def without_documents(sequences: Any) -> Any:
        return {name: value for name, value in packed_batch(sequences).items() if name != "document_ids"}

    monkeypatch.setattr(correctness, "packed_batch", without_documents)
    assert checks.packed("decoder", torch.float32) > 10 * correctness.FLOAT32


def test_motifs_are_the_same_each_time_and_end_their_documents() -> None:
    data = Motifs("train", 64, 32)
    assert np.array_equal(data[3], Motifs("train", 64, 32)[3])
    assert not np.array_equal(data[3], data[4])
    many = np.concatenate([data[index] for index in range(50)])
    assert (many.min(), many.max()) == (END, 31)
    ends = np.flatnonzero(data[3] == END)
    assert len(ends) > 0
    whole = Motifs("val", 64, 32)[0]
    assert END not in whole
    assert len(set(np.diff(whole) % 31)) == 1


def test_the_clock_counts_steps_and_ends_the_training(setting: Setting) -> None:
    weight = torch.nn.Parameter(torch.ones(4))
    optimizers = [torch.optim.SGD([weight], lr=0.1), torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))])]
    steps = 0
    with StepClock(setting, warm_up=2, steps=3, profiled=2) as clock:
        while steps < 100:
            steps += 1
            torch.autograd.backward(weight.sum())
            for optimizer in optimizers:  # as Muon has AdamW beside it
                optimizer.step()
            float(weight[0].detach())  # a synchronization
    assert steps == clock.num_steps == 7
    found = clock.result(tokens_per_step=10)
    assert found["tokens_per_sec"] == pytest.approx(10 / found["step_sec"])
    assert found["syncs_per_step"] == pytest.approx(1.0, abs=0.5)
    assert sum(kernel["share"] for kernel in found["kernels"]) <= 1.0 + 1e-6


def test_a_training_that_ends_too_early_has_no_speed(setting: Setting) -> None:
    with StepClock(setting, warm_up=2, steps=3) as clock:
        pass
    with pytest.raises(RuntimeError, match="after 0 of 7 steps"):
        clock.result(tokens_per_step=1)


@pytest.mark.parametrize("case", speeds.CASES, ids=lambda case: case.name)
def test_models_of_full_size_are_as_large_as_they_are_called(tmp_path: Path, case: speeds.Case) -> None:
    full = Setting(smoke=False, work=tmp_path, recorder=Recorder(tmp_path / "gpu.json", "any"))
    config = load_config(str(write_config(tmp_path, "full", speeds.config_of(full, case)))).config
    with torch.device("meta"):
        decoder = Decoder(config.decoder(wanted_by="the benchmark"), speeds.VOCAB_SIZE)
    size = {"124M": 124e6, "350M": 350e6, "1.3B": 1.3e9}[case.model]
    assert decoder.num_parameters() == pytest.approx(size, rel=0.02)
    theirs = llama.llama_config(peers.llama_of(full, case))
    with torch.device("meta"):
        peer = LlamaForCausalLM(theirs)
    assert sum(weight.numel() for weight in peer.parameters()) == decoder.num_parameters()


def test_the_model_that_is_tuned_has_8b_parameters() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(llama.llama_config(llama.LLAMA_8B))
    assert sum(weight.numel() for weight in model.parameters()) == 8_030_261_248


def test_the_sections_share_the_time_of_all() -> None:
    assert sum(SHARES.values()) == TOTAL_SECONDS
    assert {*SHARES} >= {*WITH_CHECKS}


def event(name: str, start: float, end: float, *, on_gpu: bool = True, annotation: bool = False) -> Any:
    return SimpleNamespace(
        name=name,
        device_type=SimpleNamespace(name="CUDA" if on_gpu else "CPU"),
        is_user_annotation=annotation,
        time_range=SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start),
        self_cpu_time_total=end - start,
    )


def test_idle_time_and_waits_are_read_from_a_profile() -> None:
    events = [
        event("gemm", 0, 300),
        event("gemm", 200, 400),  # beside the first, on another stream
        event("Memcpy HtoD (Pageable -> Device)", 600, 700),
        event("Optimizer.step", 0, 1000, annotation=True),
        event("cudaStreamSynchronize", 400, 650, on_gpu=False),
        event("aten::_local_scalar_dense", 390, 660, on_gpu=False),
    ]
    seen = what_was_seen(events, window=1e-3, steps=1)
    assert seen["gpu_idle"] == pytest.approx(0.5)
    assert seen["host_wait"] == pytest.approx(0.25)
    assert seen["syncs_per_step"] == 1
    assert seen["synchronizations"] == {
        "cudaStreamSynchronize": 1,
        "aten::_local_scalar_dense": 1,
        "pageable copies": 1,
    }
    assert seen["kernels"][0] == {"name": "gemm", "share": pytest.approx(500 / 600)}


def test_a_speed_of_another_section_is_found(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    write_document(file, {"sections": {"speeds": {"rows": [{"case": "a"}, {"case": "b", "tokens_per_sec": 2.0}]}}})
    recorder = Recorder(file, "peers")
    assert recorder.speed("speeds", "b") == 2.0
    assert recorder.speed("speeds", "a") is None
    assert recorder.speed("tuning", "b") is None


def test_wheels_are_fetched_in_the_versions_of_the_lock_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    requirements = collect(tmp_path / "wheels", ["TRL"])
    assert requirements == commands[-1][-len(requirements) :]
    assert {name.partition("==")[0] for name in requirements} >= {"pydantic", "pydantic-core", "ruamel-yaml", "trl"}
    assert all("==" in name for name in requirements)
    assert "--no-deps" in commands[-1]


def test_wheels_of_what_is_here_already_are_not_installed(tmp_path: Path) -> None:
    (tmp_path / "pydantic-1.0-py3-none-any.whl").write_bytes(b"not even a wheel")
    assert install_missing(tmp_path, tmp_path / "into") == []
    assert install_missing(tmp_path / "none", tmp_path / "into") == []
