"""A run of three attempts, sent back once and resumed with another micro-batch: whoever tells of it tells the truth.

The truth is what metrics.jsonl says, whose lines each step wrote at once.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.errors import Preempted
from llmtrain.reports.document import run_document
from llmtrain.runs.events import read_events
from llmtrain.runs.listing import list_runs
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train
from tests.support.tiny_run import SYNTHETIC, write_config

ITEMS = 100
CONFIG = {
    **SYNTHETIC,
    "run": {"seed": 7, "device": "cpu"},
    "data": {**SYNTHETIC["data"], "num_items": ITEMS, "num_val_items": 16},
    "trainer": {
        **{**SYNTHETIC["trainer"], "max_steps": 45, "log_every_steps": 1, "eval_every_steps": 5},
        **{"eval_steps": 2, "save_every_steps": 5, "keep_last": 3},
    },
    "optimizer": {"lr": 0.01},
    "tracking": {"tensorboard": {"enabled": False}},
}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the last attempt returned, with the lines of the log of all of them under `log`."""
    keys = {**CONFIG, "output": {"root_dir": str(tmp_path / "runs"), "run_id": "thrice"}}
    config = write_config(tmp_path / "tiny.yaml", keys)
    checkpoints = tmp_path / "runs" / "thrice" / "checkpoints"
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=13")
    with pytest.raises(Preempted):
        train(load_config(str(config)))
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=23")
    with pytest.raises(Preempted):
        train(None, resume=str(checkpoints / "step_000010"), overrides=["trainer.micro_batch_size=2"])
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    result = train(None, resume=str(checkpoints.parent))
    return {**result, "log": (checkpoints.parent / "logs" / "train.log").read_text()}


def test_summary_events_list_report_and_log_agree_with_the_metrics(told: dict[str, Any]) -> None:
    run = Path(told["run"])
    lines = read_metrics(run / "metrics.jsonl")
    trained = [line for line in lines if "train/loss" in line]
    validated = {line["step"]: line["val/loss"] for line in lines if "val/loss" in line}
    assert [line["step"] for line in trained] == list(range(1, 46)), "each step once, in order"
    summary = json.loads((run / "summary.json").read_text())
    truth = {
        "state": "finished",
        "steps": 45,
        "tokens": int(trained[-1]["train/tokens_total"]),
        "first_loss": trained[0]["train/loss"],
        "last_loss": trained[-1]["train/loss"],
        "val_loss": validated[45],
        "best_val_loss": min(validated.values()),
    }
    assert {key: summary[key] for key in truth} == truth
    assert {key: told[key] for key in truth} == truth
    _check_times(summary, trained)
    _check_events(run, validated)
    (listed,) = list_runs(root_dir=str(run.parent))
    same = ("state", "steps", "tokens", "val_loss", "best_val_loss", "seconds", "tokens_per_sec")
    assert {key: listed[key] for key in same} == {key: summary[key] for key in same}
    assert listed["loss"] == summary["last_loss"]
    shown = run_document(run)
    assert {key: shown[key] for key in same} == {key: summary[key] for key in same}
    assert shown["summary"]["time_spent"] == summary["time_spent"]
    assert shown["curves"]["val/loss"]["value"] == pytest.approx(list(validated.values()), rel=1e-6)
    _check_log(told["log"], trained, validated)


def _check_times(summary: dict[str, Any], trained: list[dict[str, Any]]) -> None:
    """Seconds and tokens are over the same attempts."""
    assert sum(summary["time_spent"].values()) == pytest.approx(summary["seconds"])
    assert summary["goodput"] == pytest.approx(summary["time_spent"]["step"] / summary["seconds"])
    time_at = {line["step"]: line["time"] for line in trained}
    at_least = sum(time_at[last] - time_at[first] for first, last in ((1, 10), (11, 23), (24, 45)))
    assert at_least < summary["seconds"]
    timed = [line for line in trained if "train/step_time_sec" in line]  # but for the first of each attempt
    assert [line["step"] for line in trained if line not in timed] == [1, 11, 24]
    seconds = sum(line["train/step_time_sec"] for line in timed)
    tokens = sum(line["train/tokens_per_sec"] * line["train/step_time_sec"] for line in timed)
    assert summary["tokens_per_sec"] == pytest.approx(tokens / seconds)


def _check_events(run: Path, validated: dict[int, float]) -> None:
    events = read_events(run / "events.jsonl")
    assert [(event["event"], event["step"]) for event in events if event["event"] != "saved"] == [
        ("stopped", 13),
        ("resumed", 10),
        ("stopped", 23),
        ("resumed", 23),
    ]
    sent_back = next(index for index, event in enumerate(events) if event["event"] == "resumed")
    after = [event for event in events[sent_back:] if event["event"] == "saved"]
    assert [event["step"] for event in after] == [15, 20, 23, 25, 30, 35, 40, 45]
    best = [event["step"] for event in after if event["best"]]
    for step in best:
        assert validated[step] < min(value for other, value in validated.items() if other < step)
    at_best = json.loads((run / "checkpoints" / "best" / "state.json").read_text())["position"]
    assert at_best["best"] <= min(validated.values())
    assert (run / "checkpoints" / "latest").resolve().name == "step_000045"


def _check_log(log: str, trained: list[dict[str, Any]], validated: dict[int, float]) -> None:
    assert re.search(r"going on otherwise than before: 2 sequences a batch \(4 before\)", log)
    (epoch,) = re.findall(r"epoch 1 is done: mean loss ([\d.]+) over ([\d,]+) tokens", log)
    of_epoch = [line for line in trained if line["train/epoch"] <= 1.0]
    totals = [0.0, *(line["train/tokens_total"] for line in of_epoch)]
    tokens = [now - before for before, now in pairwise(totals)]
    assert len(of_epoch) == 10 + (ITEMS - 40) // 2
    assert int(epoch[1].replace(",", "")) == sum(tokens)
    mean = sum(line["train/loss"] * part for line, part in zip(of_epoch, tokens, strict=True)) / sum(tokens)
    assert float(epoch[0]) == pytest.approx(mean, abs=1e-4)
    for step, value in validated.items():
        assert f"step {step}  val {value:.3f}" in log
    assert "compiling" not in log


def test_a_finished_run_that_is_resumed_stays_as_it_is(
    told: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(told["run"])
    before = {
        name: (run / name).read_bytes() for name in ("summary.json", "config.yaml", "metrics.jsonl", "events.jsonl")
    }
    again = train(None, resume=str(run), overrides=["trainer.max_steps=30"])
    assert "thrice is finished, at step 45: nothing is left to train" in capsys.readouterr().err
    assert {key: again[key] for key in ("state", "steps", "tokens", "seconds")} == {
        key: told[key] for key in ("state", "steps", "tokens", "seconds")
    }
    assert {name: (run / name).read_bytes() for name in before} == before
