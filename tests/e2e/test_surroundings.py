"""What surrounds a run goes away or is in the way: its terminal, the reader of its output, its home, its data."""

from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import llmtrain
from llmtrain.cli.app import run
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.training import OptimizerConfig
from llmtrain.errors import ConfigError, Preempted
from llmtrain.runs.summary import RunSummary
from llmtrain.training import loop
from llmtrain.training.checkpoint import CheckpointError, load_state
from llmtrain.training.job import Job
from llmtrain.training.setup.start import find_start
from llmtrain.verbs.train import train
from tests.support.tiny_run import SYNTHETIC, write_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config that trains three steps on data that need no preparation."""
    keys = {
        **SYNTHETIC,
        "trainer": {**SYNTHETIC["trainer"], "max_steps": 3, "save_every_steps": 1},
        "run": {"device": "cpu"},
        "output": {"root_dir": str(tmp_path / "runs"), "run_id": "one"},
        "tracking": {"tensorboard": {"enabled": False}},
    }
    return write_config(tmp_path / "tiny.yaml", keys)


def summary_of(config: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((config.parent / "runs" / "one" / "summary.json").read_text())
    return summary


def events_of(config: Path) -> list[tuple[str, int]]:
    lines = (config.parent / "runs" / "one" / "events.jsonl").read_text().splitlines()
    return [(event["event"], event["step"]) for event in map(json.loads, lines)]


def test_a_terminal_that_is_closed_saves_and_ends_with_75(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "hup@stepped:step=2")
    assert run(["train", str(config), "trainer.save_every_steps=99"]) == 75
    assert "step 2 is saved" in capsys.readouterr().err
    assert (summary_of(config)["state"], summary_of(config)["steps"]) == ("preempted", 2)
    assert (config.parent / "runs" / "one" / "checkpoints" / "step_000002").is_dir()


@pytest.mark.slow
def test_training_goes_on_without_its_terminal(config: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "train", str(config)], stdout=writer, stderr=writer, check=False
    )
    os.close(writer)
    assert done.returncode == 0
    assert (summary_of(config)["state"], summary_of(config)["steps"]) == ("finished", 3)


def test_why_a_run_failed_is_in_its_log(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "raise@temp-made:ENOSPC")
    assert run(["train", str(config)]) == 1
    folder = config.parent / "runs" / "one"
    assert "No space left on device" in (folder / "logs" / "train.log").read_text()
    assert (summary_of(config)["state"], summary_of(config)["steps"]) == ("failed", 3)
    assert events_of(config) == [("not_saved", 1), ("not_saved", 2), ("not_saved", 3)]


@pytest.mark.parametrize("point", ["temp-made", "model-written", "manifest-written", "before-rename", "before-latest"])
def test_a_run_survives_a_disk_that_is_full_for_a_while(
    config: Path, point: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"raise@{point}:ENOSPC:step=2")
    assert run(["train", str(config)]) == 0
    err = capsys.readouterr().err
    assert err.count("No space left on device") == 1
    assert "The earlier checkpoints are intact. The run goes on, and saves again when the next save is due" in " ".join(
        err.split()
    )
    assert events_of(config) == [("saved", 1), ("not_saved", 2), ("saved", 3)]
    checkpoints = config.parent / "runs" / "one" / "checkpoints"
    there = [1, 3] if point != "before-latest" else [1, 2, 3]
    assert sorted(path.name for path in checkpoints.iterdir() if path.name[0] == ".") == []
    assert sorted(int(path.name[5:]) for path in checkpoints.glob("step_*")) == there
    assert (os.readlink(checkpoints / "latest"), os.readlink(checkpoints / "final")) == ("step_000003", "step_000003")


def test_the_last_save_is_tried_twice(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "raise@model-written:EIO:3")
    assert run(["train", str(config)]) == 0
    assert events_of(config) == [("saved", 1), ("saved", 2), ("saved", 3)]


def test_a_stop_whose_save_fails_does_not_say_that_it_is_saved(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=2, raise@temp-made:EROFS:step=2")
    assert run(["train", str(config)]) == 1
    err = capsys.readouterr().err
    assert "step 2 is saved" not in err
    assert err.count("error: the checkpoint of step 2 could not be saved") == 1
    assert events_of(config) == [("saved", 1), ("not_saved", 2), ("not_saved", 2)], "when it was due, and at the stop"
    assert summary_of(config)["state"] == "failed"
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    assert run(["train", str(config), "--resume", "auto"]) == 0


def test_a_best_that_could_not_be_saved_is_not_the_best(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = iter([5.0, 1.0, 4.0, 4.5])  # after steps 1 to 4: the one of step 2 cannot be saved
    monkeypatch.setattr(Job, "evaluate", lambda *_: {"val/loss": next(losses)})
    monkeypatch.setenv("LLMTRAIN_FAULTS", "raise@temp-made:ENOSPC:step=2")
    keys = ["data.num_val_items=8", "trainer.eval_every_steps=1", "trainer.max_steps=4"]
    assert run(["train", str(config), *keys]) == 0
    checkpoints = config.parent / "runs" / "one" / "checkpoints"
    assert os.readlink(checkpoints / "best") == "step_000003"
    assert load_state(checkpoints / "final")["position"]["best"] == 4.0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "faults", "code", "events"),
    [
        ("fsdp", "raise@model-written:ENOSPC:rank=1:step=2", 0, [("saved", 1), ("not_saved", 2), ("saved", 3)]),
        ("ddp", "raise@temp-made:ENOSPC:step=3", 1, [("saved", 1), ("saved", 2), ("not_saved", 3)]),
    ],
)
def test_two_processes_survive_a_full_disk_or_fail_together(
    config: Path, strategy: str, faults: str, code: int, events: list[tuple[str, int]]
) -> None:
    keys = [f"distributed.strategy={strategy}", "trainer.micro_batch_size=2"]
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain", "train", str(config), "--nproc", "2", *keys],
        env={**os.environ, "LLMTRAIN_FAULTS": faults},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert events_of(config) == events
    assert "Traceback" not in done.stderr
    told = "error: the checkpoint of step 3 could not be saved"
    assert sum(line.startswith(told) for line in done.stderr.splitlines()) == code, "rank 0 says it once"


def test_a_run_in_another_thread_trains_and_leaves_torch_as_it_was(config: Path) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    results: list[dict[str, Any]] = []
    for overrides in ([], ["output.run_id=two", "data.seq_len=4096"]):  # the second is rejected
        thread = threading.Thread(target=_train_in_thread, args=(config, overrides, results))
        thread.start()
        thread.join()
        assert torch.are_deterministic_algorithms_enabled() == before
    assert results[0]["steps"] == 3
    assert isinstance(results[1]["error"], ConfigError)


def _train_in_thread(config: Path, overrides: list[str], results: list[dict[str, Any]]) -> None:
    try:
        results.append(llmtrain.train(config, overrides=overrides))
    except ConfigError as error:
        results.append({"error": error})


def test_objects_of_a_run_are_left_out_of_garbage_collections_until_it_is_over(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: list[int] = []
    monkeypatch.setattr(loop, "reach", lambda point, **_: frozen.append(gc.get_freeze_count()))
    gc.unfreeze()
    train(load_config(str(config), ["trainer.max_steps=5"]))
    assert frozen[0] == 0
    assert frozen[-1] > 100_000
    assert gc.get_freeze_count() == 0


def test_another_id_for_a_run_that_goes_on_is_rejected(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=2")
    with pytest.raises(Preempted):
        train(load_config(str(config)))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    checkpoint = config.parent / "runs" / "one" / "checkpoints" / "step_000001"
    for loaded, overrides in ((None, ["output.run_id=x"]), (load_config(str(config), ["output.run_id=x"]), [])):
        with pytest.raises(ConfigError, match=r"output\.run_id is x, but --resume continues the run one .*init_from"):
            train(loaded, resume=str(checkpoint), overrides=overrides)
    assert train(None, resume=str(checkpoint), overrides=["output.run_id=one"])["steps"] == 3


def test_data_that_changed_under_a_run_are_named_and_no_config_is_to_be_left_out(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=2")
    with pytest.raises(Preempted):
        train(load_config(str(config)))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    changed = ["data.num_items=99"]
    with pytest.raises(ConfigError, match=r"another data \(fingerprint .*restore the files of the data as they were"):
        train(None, resume="one", overrides=[*changed, f"output.root_dir={config.parent / 'runs'}"])
    with pytest.raises(ConfigError, match=r"by leaving CONFIG out"):
        train(load_config(str(config), changed), resume="one")


def test_processes_that_are_started_again_keep_the_config_of_their_run(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=2")
    with pytest.raises(Preempted):
        train(load_config(str(config)))
    config.write_text(config.read_text() + "optimizer: {lr: 0.5}\n")
    changed = load_config(str(config))
    assert find_start(changed, resume="auto").config.optimizer.lr == 0.5, "the user starts it with another config"
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert find_start(changed, resume="auto").config.optimizer.lr == OptimizerConfig().lr


def test_a_full_disk_hides_neither_the_reason_nor_the_file(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("LLMTRAIN_FAULTS", "raise@temp-made:ENOSPC")
    monkeypatch.setattr(RunSummary, "write", refuse)
    with pytest.raises(CheckpointError, match=r"the checkpoint of step 3 could not be saved .*No space left"):
        train(load_config(str(config)))


def test_a_run_that_is_rejected_in_its_first_step_leaves_no_folder(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("data.packing: this model cannot train on packed rows")

    monkeypatch.setattr("llmtrain.training.loop.take_step", refuse)
    assert run(["train", str(config)]) == 2
    assert list((config.parent / "runs").iterdir()) == []
