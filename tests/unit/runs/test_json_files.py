from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llmtrain.runs.json_files import json_object, json_value


@dataclass
class Score:
    value: float
    path: Path


def test_a_value_for_json_has_null_for_numbers_that_are_not_finite_at_any_depth() -> None:
    document = {
        "losses": [1.5, float("nan"), (float("inf"), np.float64("-inf"))],
        3: {"score": Score(float("nan"), Path("a/b"))},
        "flags": [True, None, 7, "NaN"],
    }

    expected = {
        "losses": [1.5, None, [None, None]],
        "3": {"score": {"value": None, "path": "a/b"}},
        "flags": [True, None, 7, "NaN"],
    }
    assert json.loads(json.dumps(json_value(document), allow_nan=False)) == expected


def test_a_file_without_an_object_is_empty_and_a_problem(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "cut.json").write_text('{"a": ')
    problems: list[str] = []

    assert [json_object(tmp_path / name, problems=problems) for name in ("list.json", "cut.json", "none.json")] == [
        {}
    ] * 3
    assert [line.partition(" ")[0] for line in problems] == ["list.json", "cut.json", "none.json"]
