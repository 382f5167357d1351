"""Text that would be obeyed by a page or a terminal if it got there as it is, and a run that has it in every place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from tests.support.recorded_run import recorded_run

MARKUP = "</title></script><script>planted()</script><img src=x onerror=planted()>{{ 7 * 7 }}&lt;b>"
COLOUR, LINK, C1 = "\x1b[31mred\x1b[0m", "\x1b]8;;http://planted.example\x1b\\link\x1b]8;;\x07", "\x9b2J\x85"
DIRECTION = "\u202egnihsif\u200f\u061c\u2067"
PLANTED = f"{MARKUP}{COLOUR}{LINK}{C1}\r{DIRECTION}"
HARMLESS = "x" * 20


def planted_run(root: Path, run_id: str, text: str) -> Path:
    """A recorded run that has `text` in its id and wherever else text enters."""
    folder = recorded_run(root, run_id + text.replace("/", "∕"), num_steps=60)
    config: dict[str, Any] = {"run": {"name": text, "notes": text}, "data": {"train": [text]}, text: {text: text}}
    with (folder / "config.yaml").open("w") as file:
        YAML().dump(config, file)
    (folder / "config.as-written.yaml").write_text(text)
    meta = json.loads((folder / "meta.json").read_text())
    place = {"sha": text, "dirty": True}
    meta |= {"notes": text, "tags": [text], "argv": ["llmtrain", text], "hostname": text, "working_folder": text}
    meta |= {"resolved": {text: text}, "versions": {text: text}, "environment": {text: text}, "git": {text: place}}
    meta |= {"hardware": {"cpu": text, "gpus": [{"name": text}]}}
    (folder / "meta.json").write_text(json.dumps(meta))
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"step": 61, "time": 1795170061.0, f"own/{text}": 1.0, "non_finite": {text: text}}) + "\n"
        )
    with (folder / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 1795170061.0, "step": 61, "event": text, "why": text}) + "\n")
    (folder / "samples.jsonl").write_text(json.dumps({"step": 50, "prompt": text, "completion": text}) + "\n")
    evaluation = folder / "eval" / "20261121-100000"
    evaluation.mkdir(parents=True)
    (evaluation / "metrics.json").write_text(json.dumps(planted_evaluation(text)))
    return folder


def planted_evaluation(text: str) -> dict[str, Any]:
    """The metrics.json of an evaluation with `text` in every place."""
    compared = {"base": 0.5, "tuned": 0.75, "difference": 0.25, "low": -0.125, "high": 0.625}
    scores = {text: 1.0, "loss": 2.0}
    return {
        "model": text,
        "baseline": text,
        "output": text,
        "data": text,
        "time": text,
        "rows": 2,
        "scores": scores,
        "files": {text: {"rows": 1, "scores": scores}, "b": {"rows": 1, "scores": scores}},
        "comparison": {text: {**compared, "wins": 1, "losses": 0, "ties": 1, "verdict": text}},
        "got_worse": {text: [text]},
        "prompts_too_long": 0,
        "rows_without_loss": 0,
        "rows_not_defined": {text: 1},
        "empty_predictions": 1,
        "definitions": {text: text},
        "signatures": {text: text},
        "contamination": {
            "checked": True,
            "rows": 1,
            "exact": 1,
            "named": [text],
            "scores_with": scores,
            "scores_without": scores,
        },
        "settings": {text: text},
    }


def planted_row(text: str) -> dict[str, Any]:
    """A line of predictions.jsonl."""
    side = {"prediction": text, "scores": {text: 1.0}}
    return {
        "source": text,
        "prompt": text,
        "expected": text,
        **side,
        "baseline": side,
        "change": "worse",
        "trained_on": text,
    }
