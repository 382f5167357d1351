"""Curves from metrics.jsonl: cut and foreign lines, metrics that are not finite, pauses, and what is drawn."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmtrain.runs.curves import MEANS, as_drawn, read_curves, tokens_by_step


def test_a_file_cut_in_the_middle_of_a_line_gives_all_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "time": 100.0 + step, "train/loss": 3.0 - step}) + "\n" for step in (1, 2, 3)]
    whole = "".join(lines)
    for cut in range(len(whole) - len(lines[-1]), len(whole)):
        path.write_text(whole[:cut])
        curves = read_curves(path, began=100.0)
        assert curves.by_name["train/loss"].step.tolist() == [1, 2]
        assert curves.by_name["train/loss"].value.tolist() == [2.0, 1.0]
        assert curves.num_bytes == len(lines[0] + lines[1])
        assert curves.damaged_lines == 0


def test_damaged_and_foreign_lines_are_counted_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 1, "time": 5.0, "train/loss": 2.5, "text": "x", "flag": true}\n'
    large = f'{{"step": {"9" * 400}, "time": 1}}\n{{"step": 2, "time": 6.0, "train/lr": {"9" * 400}}}\n' + "[" * 100_000
    damaged = b'{"step": 1, "tra\n[1]\n7\n\xff\xfe\n{"step": "2", "time": 1}\n'
    path.write_bytes(damaged + good.encode() + large.encode() + b"\n")
    curves = read_curves(path, began=None)
    assert list(curves.by_name) == ["train/loss"]
    assert curves.damaged_lines == 7
    assert read_curves(tmp_path / "none", began=None).num_points == 0


def test_metrics_that_are_not_finite_are_kept_apart(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "time": 1.0, "train/loss": 2.0}\n'
        '{"step": 2, "time": 2.0, "train/loss": null, "non_finite": {"train/loss": "nan"}}\n'
    )
    curves = read_curves(path, began=0.0)
    assert curves.by_name["train/loss"].value.tolist() == [2.0]
    assert curves.non_finite == ((2, "train/loss", "nan"),)


def test_the_time_that_a_run_lay_still_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    times = [100, 110, 120, 1000, 1010]
    path.write_text("".join(f'{{"step": {n}, "time": {time}, "train/lr": 1}}\n' for n, time in enumerate(times)))
    curves = read_curves(path, began=90.0, resumes=[995.0])
    assert curves.by_name["train/lr"].seconds.tolist() == [10, 20, 30, 35, 45]
    assert curves.began == 90.0 + 875.0
    assert read_curves(path, began=90.0).by_name["train/lr"].seconds.tolist() == [10, 20, 30, 910, 920]


def test_many_points_are_drawn_as_few_with_means_of_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        for step in range(5000):
            loss = 99.0 if step == 1234 else float(step % 2)
            file.write(
                f'{{"step": {step}, "time": {step}, "train/loss": {loss}, "train/tokens_total": {step * 64.0}}}\n'
            )
    curves = read_curves(path, began=0.0)
    assert curves.num_points == 10_000
    drawn = as_drawn(curves, num_points=400)["train/loss"]
    assert drawn["count"] == 5000
    assert len(drawn["step"]) == len(drawn["value"]) == len(drawn["seconds"]) <= 400
    assert max(drawn["value"]) == 99.0
    assert len(drawn["means"]["value"]) == MEANS
    without_spike = [value for value in drawn["means"]["value"] if value < 1]
    assert without_spike == pytest.approx([0.5] * (MEANS - 1))
    tokens = tokens_by_step(curves)
    assert (tokens["step"][-1], tokens["tokens"][-1]) == (4999, 4999 * 64)


def test_few_points_are_all_drawn_and_written_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "time": 1.23456, "a/b": 0.1234567891234}\n{"step": 2, "time": 2.0, "a/b": 3.0}\n')
    drawn = as_drawn(read_curves(path, began=1.0))
    assert drawn == {"a/b": {"count": 2, "step": [1, 2], "seconds": [0.23, 1], "value": [0.1234568, 3]}}


def test_a_clock_that_is_set_back_stands_still_until_it_has_caught_up(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    times = [100, 110, 50, 115, 60, 70]
    path.write_text("".join(f'{{"step": {n}, "time": {time}, "train/lr": 1}}\n' for n, time in enumerate(times)))
    assert read_curves(path, began=90.0).by_name["train/lr"].seconds.tolist() == [10, 20, 20, 25, 25, 25]
    early = read_curves(path, began=500.0, resumes=[55.0]).by_name["train/lr"].seconds.tolist()
    assert early == [0, 10, 10, 15, 15, 15], "the clock was set back after the run had begun"
