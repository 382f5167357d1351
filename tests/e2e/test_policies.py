"""What a run does about bad figures, about a loss that falls no more, and when it saves: through the whole recipe."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.errors import Preempted, WillFailAgain
from llmtrain.runs.folders import find_model
from llmtrain.training.checkpoint import load_state
from llmtrain.training.non_finite import Policy, StepNumbers, judge
from llmtrain.training.state import RunState
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash

NAN = float("nan")


def run_with(config_file: Path, *overrides: str, run_id: str = "run", resume: str | None = None) -> dict[str, Any]:
    return train(load_config(str(config_file), [*overrides, f"output.run_id={run_id}"]), resume=resume)


def spoil(monkeypatch: pytest.MonkeyPatch, bad: Callable[[range], bool]) -> list[range]:
    """Let the loss of steps whose items are `bad` be no number; the list of all items that were computed."""
    computed: list[range] = []

    def judge_spoilt(found: StepNumbers, state: RunState, *, policy: Policy) -> None:
        if not state.leaves_out(found.items):
            computed.append(found.items)
            found = found._replace(loss=NAN) if bad(found.items) else found
        judge(found, state, policy=policy)

    monkeypatch.setattr("llmtrain.training.step.judge", judge_spoilt)
    return computed


def figures(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def saved_steps(run: Path) -> list[int]:
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step_*"))


def test_skip_goes_on_with_the_next_items_and_says_so(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = spoil(monkeypatch, lambda items: items.start in (48, 52))
    summary = run_with(config_file, "trainer.non_finite=skip")
    assert [items.start for items in computed] == list(range(0, 120, 4))
    lines = figures(Path(summary["run"]))
    skipped = {line["step"]: line["train/skipped_steps"] for line in lines if "train/skipped_steps" in line}
    assert (skipped[13], skipped[14], skipped[30]) == (1, 2, 2)
    assert 12 not in skipped
    assert summary["skipped_steps"] == 2
    assert summary["steps"] == 30


def test_rollback_leaves_the_items_out_and_is_the_same_run_whenever_it_is_stopped(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = spoil(monkeypatch, lambda items: items.start in (48, 56))
    whole = run_with(config_file, "trainer.non_finite=rollback", run_id="whole")
    starts = [items.start for items in computed]
    # at 48 and again at 56 back to step 10, whose next item is 40; the third time both are left out
    assert starts == [*range(0, 52, 4), 40, 44, 52, 56, 40, 44, 52, *range(60, 120, 4)]
    state = load_state(Path(whole["run"]) / "checkpoints" / "latest")["position"]
    assert state["left_out"] == [[48, 52], [56, 60]]
    assert (state["step"], state["item"]) == (30, 120)
    trained = [line["step"] for line in figures(Path(whole["run"])) if "train/loss" in line]
    assert trained == [step for step in range(1, 31) if step not in (13, 15)], "each step once, and none for nothing"

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=14:2")
    with pytest.raises(Preempted):
        run_with(config_file, "trainer.non_finite=rollback", run_id="stopped")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    stopped = train(None, resume=str(config_file.parent / "runs" / "stopped"))
    assert weight_hash(Path(stopped["run"])) == weight_hash(Path(whole["run"]))


def test_rollback_before_the_first_save_goes_back_to_the_start(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = spoil(monkeypatch, lambda items: items.start == 8)
    run_with(config_file, "trainer.non_finite=rollback", "trainer.max_steps=5")
    assert [items.start for items in computed] == [0, 4, 8, 0, 4, 12, 16]


def test_a_run_whose_every_step_is_bad_ends_with_42_under_each_policy(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda items: items.start >= 20)
    for policy in ("stop", "skip", "rollback"):
        with pytest.raises(WillFailAgain):
            run_with(config_file, f"trainer.non_finite={policy}", run_id=policy)


def test_early_stopping_ends_the_run_finished_with_a_final_checkpoint(config_file: Path) -> None:
    overrides = ["optimizer.lr=1e-9", "trainer.eval_every_steps=2", "trainer.save_every_steps=null"]
    patient = [*overrides, "trainer.early_stopping={patience: 3, min_delta: 0.01}"]
    summary = run_with(config_file, *patient)
    run = Path(summary["run"])
    assert (summary["steps"], summary["state"]) == (8, "finished")
    assert (run / "checkpoints" / "final").resolve() == run / "checkpoints" / "step_000008"
    again = run_with(config_file, *patient, resume=str(run))
    assert again["steps"] == 8
    longer = run_with(config_file, *overrides, "trainer.max_steps=12", resume=str(run))
    assert longer["steps"] == 12


def test_saving_and_evaluating_by_seconds_and_at_the_end_of_epochs(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = ["trainer.save_every_steps=null", "trainer.eval_every_steps=null", "trainer.keep_last=99"]
    slow = ["trainer.max_steps=40", "trainer.save_every_seconds=0.2", "trainer.eval_every_seconds=0.25"]
    monkeypatch.setenv("LLMTRAIN_FAULTS", "sleep@step:0.03")
    began = time.monotonic()
    run = Path(run_with(config_file, *never, *slow)["run"])
    seconds = time.monotonic() - began
    assert 2 <= len(saved_steps(run)) <= seconds / 0.2 + 3
    assert saved_steps(run)[-1] == 40
    assert 2 <= sum("val/loss" in line for line in figures(run)) <= seconds / 0.25 + 2

    monkeypatch.delenv("LLMTRAIN_FAULTS")
    big = ["trainer.micro_batch_size=256", "trainer.max_epochs=3", "trainer.max_steps=null"]
    by_epoch = [*big, "trainer.save_every_epochs=1", "trainer.eval_every_epochs=2"]
    summary = run_with(config_file, *never, *by_epoch, run_id="epochs")
    lines = figures(Path(summary["run"]))
    ends = [line["step"] for line in lines if "val/loss" in line]
    epoch_at = {line["step"]: line["train/epoch"] for line in lines if "train/epoch" in line}
    saves = [step for step in saved_steps(Path(summary["run"])) if step not in ends or epoch_at[step] in (2.0, 3.0)]
    assert [round(epoch_at[step]) for step in saved_steps(Path(summary["run"]))] == [1, 2, 3], saves
    assert len(ends) == 2
    assert epoch_at[ends[1]] == 3.0
    assert 2.0 <= epoch_at[ends[0]] < 2.1


def test_float16_scales_the_loss_and_its_scale_is_in_the_checkpoint(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = ["trainer.precision=16-mixed", "trainer.max_steps=20"]
    whole = run_with(config_file, *half, run_id="whole")
    lines = figures(Path(whole["run"]))
    scales = [line["train/loss_scale"] for line in lines if "train/loss_scale" in line]
    assert scales[-1] <= 2.0**16
    assert "train/skipped_steps" not in lines[-1]
    assert whole["last_loss"] < whole["first_loss"]
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=7")
    with pytest.raises(Preempted):
        run_with(config_file, *half, run_id="stopped")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    run = config_file.parent / "runs" / "stopped"
    assert load_state(run / "checkpoints" / "latest")["position"]["loss_scale"]["good_steps"] == 7
    train(None, resume=str(run))
    assert weight_hash(run) == weight_hash(Path(whole["run"]))


@pytest.mark.parametrize("name", ["adam", "sgd", "muon"])
def test_every_optimizer_learns_and_resumes_bit_for_bit(
    config_file: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [f"optimizer.name={name}", f"optimizer.lr={0.1 if name == 'sgd' else 0.003}", "trainer.max_steps=16"]
    whole = run_with(config_file, *chosen, run_id="whole")
    assert whole["last_loss"] < whole["first_loss"] - 0.05
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=5")
    with pytest.raises(Preempted):
        run_with(config_file, *chosen, run_id="stopped")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    run = config_file.parent / "runs" / "stopped"
    train(None, resume=str(run))
    assert weight_hash(run) == weight_hash(Path(whole["run"]))


def test_the_config_as_written_lies_beside_the_resolved_one_without_secrets(config_file: Path) -> None:
    text = config_file.read_text() + "# my note: hf_abcdefghijklmnopqrstuvwx1234\n"
    config_file.write_text(text)
    run = Path(run_with(config_file, "trainer.max_steps=2")["run"])
    kept = (run / "config.as-written.yaml").read_text()
    assert "# my note: ***" in kept
    assert "hf_abc" not in kept
    assert "trainer.max_steps=2" not in kept
    assert "min_lr_ratio" not in kept
    assert kept.splitlines()[0] == text.splitlines()[0]


def test_a_run_on_a_file_system_without_renames_and_links_can_be_found_resumed_and_used(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    whole = Path(run_with(config_file, run_id="whole")["run"])
    for name in ("rename", "replace", "symlink"):
        monkeypatch.setattr(os, name, refuse)
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=13")
    with pytest.raises(Preempted):
        run_with(config_file, run_id="mounted")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    mounted = config_file.parent / "runs" / "mounted"
    assert (mounted / "logs" / "train.log").read_text().count("(an object store's mount?)") == 1
    assert (config_file.parent / "runs" / "latest").read_text() == "mounted\n"
    summary = train(None, resume="latest", overrides=[f"output.root_dir={config_file.parent / 'runs'}"])
    assert summary["resumed_from_step"] == 13
    model = find_model("mounted", config_file.parent / "runs")
    assert model == mounted / "checkpoints" / "step_000030" / "model" == find_model(str(mounted / "model"), Path())
    for file in ("model.safetensors", "config.json"):
        assert (model / file).read_bytes() == (whole / "model" / file).read_bytes()


def test_activation_checkpointing_trains_to_the_same_weights(config_file: Path) -> None:
    """With dropout, whose random numbers are drawn again in the backward pass."""
    ways = {
        "none": ["trainer.activation_checkpointing=none"],
        "selective": ["trainer.activation_checkpointing=selective"],
        "full": ["trainer.activation_checkpointing=full"],
        "auto": ["trainer.activation_checkpointing=auto", "trainer.memory_budget_gb=0.001"],
    }
    runs = {
        name: Path(run_with(config_file, "trainer.max_steps=6", *way, run_id=name)["run"]) for name, way in ways.items()
    }
    assert len({weight_hash(run) for run in runs.values()}) == 1
    recorded = {name: load_state(run / "checkpoints" / "latest")["resolved"] for name, run in runs.items()}
    counts = {name: resolved["recomputed_blocks"] for name, resolved in recorded.items()}
    assert counts == {"none": 0, "selective": 1, "full": 2, "auto": 2}
    more = ["trainer.max_steps=8", "trainer.memory_budget_gb=1000"]
    resumed = train(None, resume=str(runs["auto"]), overrides=more)
    state = load_state(Path(resumed["run"]) / "checkpoints" / "latest")
    assert state["resolved"]["recomputed_blocks"] == 2, "as the run began, whatever the memory is now"
