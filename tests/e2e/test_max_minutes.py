"""trainer.max_minutes: a number of steps that fits into the time, fixed at the start, and an ordinary run after it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError, Preempted
from llmtrain.training import time_limit
from llmtrain.training.time_limit import Speed
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash

TIMED = ["trainer.max_steps=null", "trainer.max_minutes=0.1"]


def run_of(config_file: Path, *overrides: str, run_id: str, resume: str | None = None) -> Path:
    return Path(train(load_config(str(config_file), [*overrides, f"output.run_id={run_id}"]), resume=resume)["run"])


def fix_speed(monkeypatch: pytest.MonkeyPatch, *, step: float, validation: float = 0.0) -> None:
    """Let each part of a run take so many seconds, by the clock of the measurement."""
    monkeypatch.setattr(time_limit, "_measure_speed", lambda job, limit_sec: Speed(step=step, validation=validation))


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd", "muon"])
def test_what_it_trained_is_an_ordinary_config_that_gives_the_same_weights(config_file: Path, optimizer: str) -> None:
    keys = [f"optimizer.name={optimizer}", "optimizer.momentum=0.9", "trainer.eval_every_steps=null"]
    timed = run_of(config_file, *TIMED, *keys, "trainer.max_minutes=0.04", run_id="timed")
    trainer = load_config(str(timed / "config.yaml")).config.trainer
    assert trainer.max_minutes is None
    assert trainer.max_steps == json.loads((timed / "summary.json").read_text())["steps"] > 3
    assert json.loads((timed / "meta.json").read_text())["resolved"]["max_steps"] == trainer.max_steps
    again = run_of(timed / "config.yaml", run_id="again")
    assert weight_hash(again) == weight_hash(timed)


def test_a_resumed_run_keeps_the_number_of_steps(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch, step=0.2)
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=7")
    with pytest.raises(Preempted):
        run_of(config_file, *TIMED, run_id="stopped")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    fixed = load_config(str(config_file.parent / "runs" / "stopped" / "config.yaml")).config.trainer.max_steps
    assert fixed in range(10, 30)
    fix_speed(monkeypatch, step=0.05)
    stopped = run_of(config_file, *TIMED, run_id="stopped", resume="auto")
    whole = run_of(config_file, f"trainer.max_steps={fixed}", run_id="whole")
    assert weight_hash(stopped) == weight_hash(whole)
    assert load_config(str(stopped / "config.yaml")).config.trainer.max_steps == fixed


def test_the_smaller_of_two_limits_counts(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch, step=0.1)
    few = run_of(config_file, "trainer.max_steps=5", "trainer.max_minutes=0.1", run_id="few")
    trainer = load_config(str(few / "config.yaml")).config.trainer
    assert (trainer.max_steps, trainer.max_minutes) == (5, None)
    many = run_of(config_file, "trainer.max_steps=null", "trainer.max_epochs=9", TIMED[1], run_id="many")
    trainer = load_config(str(many / "config.yaml")).config.trainer
    assert trainer.max_epochs is None
    assert 20 < (trainer.max_steps or 0) < 60


def test_evaluations_have_their_time(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch, step=0.1, validation=2.0)
    run = run_of(config_file, *TIMED, "trainer.eval_every_steps=10", run_id="evaluated")
    # 10 steps and an evaluation take 3 s of less than 6; after 10 more there would be no time for a second one.
    assert load_config(str(run / "config.yaml")).config.trainer.max_steps in range(10, 20)


def test_no_time_for_a_single_step_is_an_error(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fix_speed(monkeypatch, step=7.0)
    with pytest.raises(ConfigError, match=r"max_minutes is 0\.1, but .* a step takes 7 s, an evaluation 0 s: raise"):
        run_of(config_file, *TIMED, run_id="none")
    assert not (config_file.parent / "runs").exists()


def test_a_run_that_is_given_more_minutes_keeps_its_optimizer_state(config_file: Path) -> None:
    for run_id in ("timed", "counted"):
        run_of(config_file, "trainer.max_steps=8", run_id=run_id)
    more = [*TIMED, "trainer.max_minutes=0.04"]
    timed = run_of(config_file, *more, run_id="timed", resume="timed")
    steps = load_config(str(timed / "config.yaml")).config.trainer.max_steps
    assert steps is not None
    assert steps > 8
    counted = run_of(config_file, f"trainer.max_steps={steps}", run_id="counted", resume="counted")
    assert weight_hash(counted) == weight_hash(timed)
