"""A run that is stopped and resumed ends like one that was not: every bit of its weights, every line of metrics.

The stop is a real signal, sent at a chosen step; kills of a real process are at the end.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.data.batches import TrainingSet
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokens import open_training_data
from llmtrain.errors import ConfigError, Preempted
from llmtrain.runs.attempts import MAX_RESTARTS
from llmtrain.tracking.metric_names import TRAIN_LOSS
from llmtrain.training.checkpoint import newest_good, verify
from llmtrain.training.non_finite import Policy, StepNumbers, judge
from llmtrain.training.state import RunState
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash
from tests.support.worker_groups import GroupServer


def train_run(config_file: Path, *overrides: str, run_id: str) -> Path:
    loaded = load_config(str(config_file), [*overrides, f"output.run_id={run_id}"])
    return Path(train(loaded)["run"])


def losses(run: Path) -> dict[int, float]:
    """Return step → training loss from metrics.jsonl; each step is there once."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [(line["step"], line[TRAIN_LOSS]) for line in lines if TRAIN_LOSS in line]
    assert len(dict(found)) == len(found), "a step stands twice in metrics.jsonl"
    return dict(found)


def validations(run: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["val/loss"]) for line in lines if "val/loss" in line]


def stop_after(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Send SIGTERM to this process as soon as `step` steps are done."""
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"term@stepped:step={step}")


BIG_STEPS = ["trainer.micro_batch_size=256", "model.num_layers=1", "model.d_model=16"]
"""An epoch in some thirty steps."""


def steps_per_epoch(config_file: Path) -> int:
    config = load_config(str(config_file)).config
    return -(-open_training_data(ensure_shards(config), seed=7).items_per_epoch // 256)


@pytest.fixture(scope="module")
def whole() -> dict[str, Path]:
    """`run`: the folder of a run that nobody stopped, once a test has made it."""
    return {}


@pytest.mark.parametrize("step", [1, 10, 13, 29])
@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_bit_identical(
    config_file: Path, step: int, workers: int, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "run" not in whole:
        whole["run"] = train_run(config_file, run_id="whole")
    stop_after(monkeypatch, step)
    with pytest.raises(Preempted, match=f"step {step} is saved") as stopped:
        train_run(config_file, f"data.num_workers={workers}", run_id="stopped")
    assert stopped.value.exit_code == 75
    run = config_file.parent / "runs" / "stopped"
    result = train(None, resume=str(run))
    assert result["resumed_from_step"] == step
    assert weight_hash(run) == weight_hash(whole["run"])
    assert losses(run) == losses(whole["run"])
    assert validations(run) == validations(whole["run"])


@pytest.mark.parametrize("distance", [-1, 0, 1])
def test_resume_at_the_edge_of_an_epoch(config_file: Path, distance: int, monkeypatch: pytest.MonkeyPatch) -> None:
    edge = steps_per_epoch(config_file)
    overrides = [*BIG_STEPS, f"trainer.max_steps={edge + 4}", "trainer.eval_every_steps=1000"]
    complete = train_run(config_file, *overrides, run_id="whole")
    stop_after(monkeypatch, edge + distance)
    with pytest.raises(Preempted):
        train_run(config_file, *overrides, run_id="stopped")
    run = config_file.parent / "runs" / "stopped"
    train(None, resume=str(run))
    assert weight_hash(run) == weight_hash(complete)
    assert losses(run) == losses(complete)


def test_an_epoch_uses_each_token_once_even_when_it_is_resumed(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = [*BIG_STEPS, "trainer.max_steps=null", "trainer.max_epochs=1"]
    complete = train(load_config(str(config_file), [*overrides, "output.run_id=whole"]))
    stop_after(monkeypatch, 3)
    with pytest.raises(Preempted):
        train_run(config_file, *overrides, run_id="stopped")
    resumed = train(None, resume=str(config_file.parent / "runs" / "stopped"))
    manifest = json.loads((Path(load_config(str(config_file)).config.prepare.output) / "manifest.json").read_text())  # type: ignore[union-attr]
    tokens = sum(shard["tokens"] for shard in manifest["splits"]["train"]["shards"])
    assert complete["tokens"] == resumed["tokens"] == tokens - 1


def test_a_different_batch_size_loses_and_repeats_no_item(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(monkeypatch, 5)
    with pytest.raises(Preempted):
        train_run(config_file, run_id="stopped")
    run = config_file.parent / "runs" / "stopped"
    taken: list[tuple[int, int]] = []

    def note(found: StepNumbers, state: RunState, *, policy: Policy) -> None:
        taken.append((found.items.start, found.items.stop))
        judge(found, state, policy=policy)

    monkeypatch.setattr("llmtrain.training.step.judge", note)
    train(None, resume=str(run), overrides=["trainer.micro_batch_size=8", "trainer.max_steps=8"])
    assert taken == [(20, 28), (28, 36), (36, 44)]


@pytest.mark.parametrize("point", ["evaluation", "data:11", "step:11", "update:10", "before-copy", "after-copy"])
def test_a_signal_anywhere_saves_the_step_once_and_the_resume_repeats_what_it_interrupted(
    config_file: Path, point: str, whole: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    if "run" not in whole:
        whole["run"] = train_run(config_file, run_id="whole")
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"term@{point}" if ":" in point else f"term@{point}:1")
    with pytest.raises(Preempted, match="step 10 is saved"):
        train_run(config_file, run_id="stopped")
    run = config_file.parent / "runs" / "stopped"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_000010"]
    verify(run / "checkpoints" / "step_000010")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    train(None, resume=str(run))
    assert weight_hash(run) == weight_hash(whole["run"])
    assert validations(run) == validations(whole["run"])


def test_a_signal_during_a_long_wait_for_data_is_heard_at_once(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = TrainingSet.batches

    def stuck(self: TrainingSet, **rest: Any) -> Any:
        for index, micro_batches in enumerate(batches(self, **rest)):
            if index == 4:
                threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
                time.sleep(60)
            yield micro_batches

    monkeypatch.setattr(TrainingSet, "batches", stuck)
    began = time.monotonic()
    with pytest.raises(Preempted, match="step 4 is saved"):
        train_run(config_file, run_id="stuck")
    assert time.monotonic() - began < 30
    verify(config_file.parent / "runs" / "stuck" / "checkpoints" / "step_000004")


def test_a_resume_with_another_model_or_other_data_is_rejected(config_file: Path) -> None:
    run = train_run(config_file, "trainer.max_steps=3", run_id="small")
    with pytest.raises(ConfigError, match=r"made with another model \(num_layers 2 → 3\)"):
        train(load_config(str(config_file), ["model.num_layers=3"]), resume=str(run))
    with pytest.raises(ConfigError, match=r"made with another data \(seq_len 32 → 16\)"):
        train(load_config(str(config_file), ["data.seq_len=16"]), resume=str(run))


def test_a_resume_passes_over_a_damaged_checkpoint(config_file: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = train_run(config_file, run_id="damaged")
    weights = run / "checkpoints" / "step_000030" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    result = train(None, resume=str(run))
    assert result["resumed_from_step"] == 20
    assert "step_000030" in (run / "logs" / "train.log").read_text()
    verify(run / "checkpoints" / "step_000030")


def test_any_damaged_file_of_a_checkpoint_is_named_and_the_checkpoint_before_is_used(config_file: Path) -> None:
    run = train_run(config_file, run_id="harmed")
    newest, before = (run / "checkpoints" / f"step_{step:06d}" for step in (30, 20))
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    assert {path.name for path in files} >= {
        "MANIFEST.json",
        "state.json",
        "model.safetensors",
        "shard_00000.safetensors",
    }
    for path in files:
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 4
        for harmed in (content[:-1], bytes(flipped), None):
            path.unlink()
            if harmed is not None:
                path.write_bytes(harmed)
            good, reasons = newest_good(run / "checkpoints") or (None, [])
            assert good == before, path
            assert path.name in reasons[0]
        path.write_bytes(content)
    assert newest_good(run / "checkpoints") == (newest, [])


def may_be_killed_again(run: Path) -> bool:
    """Whether the next start would not be the fourth from one checkpoint, which ends with 42.

    A kill between a checkpoint's rename and its link leaves `latest` behind, so the run's own count is asked.
    """
    attempts = run / "attempts.json"
    if not attempts.exists():
        return True
    counted = json.loads(attempts.read_text())
    newest: str = (run / "checkpoints" / "latest").resolve().name
    return bool(counted["restarts"] < MAX_RESTARTS or newest > str(counted["checkpoint"]))


@pytest.mark.slow
def test_ten_kills_at_random_moments_cost_nothing_but_time(config_file: Path, groups: GroupServer) -> None:
    complete = train_run(config_file, "trainer.max_steps=400", "trainer.save_every_steps=400", run_id="whole")
    moments = random.Random(3)
    run = config_file.parent / "runs" / "killed"
    arguments = [str(config_file), "trainer.max_steps=400", "trainer.save_every_steps=7", "output.run_id=killed"]
    kills = 0
    while kills < 10:
        has_checkpoint = (run / "checkpoints" / "latest").exists()
        words = ["--resume", str(run), *arguments[1:]] if has_checkpoint else arguments
        process = groups.start(["train", *words])
        deadline = time.monotonic() + 60
        before = (run / "metrics.jsonl").stat().st_size if has_checkpoint else 0
        while time.monotonic() < deadline and process.codes() is None:
            size = (run / "metrics.jsonl").stat().st_size if (run / "metrics.jsonl").exists() else 0
            if size != before and (run / "checkpoints" / "latest").exists() and may_be_killed_again(run):
                break
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.4))
        if process.codes() is not None:
            break
        process.send(signal.SIGKILL, pid=process.pids[0])
        process.wait()
        kills += 1
    result = train(None, resume=str(run))
    assert kills >= 5, "the run was over before it could be killed often enough"
    assert result["steps"] == 400
    assert weight_hash(run) == weight_hash(complete)
    assert losses(run) == losses(complete)
