"""What rows come to: a metric that no row defines is null, said on the terminal, and no reason to publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.evaluate import _blocks
from llmtrain.cli.output import printable
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.data.chat.shapes import PromptCompletion
from llmtrain.errors import RunError
from llmtrain.evaluation.answers import Answer
from llmtrain.evaluation.folder import write_evaluation
from llmtrain.evaluation.measured import measure
from llmtrain.evaluation.questions import Question
from llmtrain.publishing.improvement import Evaluation, check_improvement


def evaluated(
    folder: Path, *rows: tuple[str, str, str], precisions: tuple[str, str] = ("float32", "float32")
) -> dict[str, Any]:
    """The metrics.json of rows of (expected, answer, answer of the baseline)."""
    questions = [
        Question("q.jsonl", f"q.jsonl:{n}", PromptCompletion("?", row[0]), row[0]) for n, row in enumerate(rows)
    ]
    sides = [
        [Answer(prediction=row[side], ended_by="end", tokens=3, loss_sum=1.0, loss_tokens=2) for row in rows]
        for side in (1, 2)
    ]
    settings = EvaluationConfig(metrics=["exact_match", "rougeL", "bleu"], resamples=100)
    found = measure(questions, sides[0], sides[1], settings, precisions=precisions, seed=1)
    about = {"model": "m", "baseline": "b", "output": str(folder), "contamination": {"checked": False, "why": "no"}}
    folder.mkdir(exist_ok=True)
    write_evaluation(folder, {**about, **found.document(), "settings": {}}, found.rows([]))
    document: dict[str, Any] = json.loads((folder / "metrics.json").read_text())
    return document


def test_a_metric_that_no_row_defines_is_null_and_cannot_be_required(tmp_path: Path) -> None:
    document = evaluated(tmp_path, ("→", "→", "x"), ("∑。", "∑。", "y"))
    assert document["scores"]["exact_match"] == 1
    assert document["scores"]["rougeL"] is None
    assert document["rows_not_defined"] == {"rougeL": 2}
    compared = document["comparison"]["rougeL"]
    assert (compared["base"], compared["low"], compared["verdict"]) == (None, None, "not defined")
    text = printable(list(_blocks(document)))
    assert next(line.split() for line in text.splitlines() if line.startswith("  rougeL ")) == [
        "rougeL",
        "not",
        "defined",
    ]
    assert "rougeL is not defined for 2 rows: nothing in what was expected is a word" in text
    assert "rougeL is not defined for 2 rows" in (tmp_path / "report.html").read_text()
    with pytest.raises(RunError, match="not published: rougeL is not defined for these rows"):
        check_improvement(Evaluation(tmp_path / "metrics.json", document), "rougeL", how="llmtrain eval")


def test_a_gain_in_chinese_can_be_required(tmp_path: Path) -> None:
    rows = [
        (f"今天是{number}号，天气很好。", f"今天是{number}号，天气很好。", "我不知道") for number in "一二三四五六七八"
    ]
    document = evaluated(tmp_path, *rows)
    assert document["scores"] == {**document["scores"], "exact_match": 1, "rougeL": 1, "bleu": pytest.approx(100)}
    assert "|tok:zh|" in document["signatures"]["bleu"]
    for metric in ("exact_match", "rougeL", "bleu"):
        check_improvement(Evaluation(tmp_path / "metrics.json", document), metric, how="llmtrain eval")


def test_the_definition_of_the_loss_names_the_precision_and_two_of_them_if_models_differ(tmp_path: Path) -> None:
    document = evaluated(tmp_path / "same", ("a", "a", "b"))
    assert document["definitions"]["loss"].endswith("; nats a token; computed in float32")
    mixed = evaluated(tmp_path / "mixed", ("a", "a", "b"), precisions=("bfloat16 (autocast)", "float32"))
    assert (mixed["precision"], mixed["baseline_precision"]) == ("bfloat16 (autocast)", "float32")
    assert mixed["definitions"]["loss"].endswith("; computed in bfloat16 (autocast), of the baseline in float32")
    assert "of the baseline in float32" in (tmp_path / "mixed" / "report.html").read_text()
