"""`runs`: states and results as they are on disk; damaged and foreign folders break nothing; comparisons."""

from __future__ import annotations

import json
import multiprocessing
import os
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.errors import ConfigError
from llmtrain.runs.folders import create_run, locked
from llmtrain.runs.listing import last_metrics, list_runs
from llmtrain.verbs.runs import compare_runs

SUMMARY = {"state": "finished", "steps": 20, "tokens": 640, "seconds": 3.5, "last_loss": 2.5, "val_loss": 2.75}


def make_run(root: Path, run_id: str, *, minute: int = 0, **summary: Any) -> Path:
    folder = create_run(root, run_id)
    (folder / "config.yaml").write_text(
        f"schema_version: 1\nrun:\n  name: {run_id}-name\n  seed: {minute}\noptimizer:\n  lr: 0.003\n"
    )
    (folder / "meta.json").write_text(json.dumps({"run_id": run_id, "time": f"2026-11-20T10:{minute:02}:00+00:00"}))
    lines = [
        {"step": 10, "time": 1795170000.0, "train/loss": 3.0, "train/tokens_total": 320.0},
        {"step": 20, "time": 1795170060.0, "train/loss": 2.6, "train/tokens_total": 640.0},
        {"step": 20, "time": 1795170061.0, "val/loss": 2.75, "val/bits_per_byte": 1.25},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if summary.get("state") != "none":
        (folder / "summary.json").write_text(json.dumps(SUMMARY | summary))
    return folder


def test_runs_are_listed_newest_first_with_their_results(tmp_path: Path) -> None:
    make_run(tmp_path, "b", minute=2)
    make_run(tmp_path, "a", minute=5, state="preempted")
    make_run(tmp_path, "c", minute=3, state="failed", last_loss=None, non_finite={"last_loss": "nan"})
    runs = list_runs(root_dir=str(tmp_path))
    assert [(one["id"], one["state"]) for one in runs] == [("a", "preempted"), ("c", "failed"), ("b", "finished")]
    size = sum(os.lstat(file).st_size for file in (tmp_path / "b").rglob("*") if file.is_file())
    assert runs[2] == {
        "id": "b",
        "name": "b-name",
        "state": "finished",
        "steps": 20,
        "loss": 2.5,
        "val_loss": 2.75,
        "best_val_loss": None,
        "bits_per_byte": 1.25,
        "tokens_per_sec": None,
        "tokens": 640,
        "seconds": 3.5,
        "bytes": size,
        "time": "2026-11-20T10:02:00+00:00",
        "folder": str(tmp_path / "b"),
        "notes": None,
        "tags": None,
        "problems": [],
    }


def test_a_run_without_a_summary_was_killed_and_is_known_by_its_curves(tmp_path: Path) -> None:
    make_run(tmp_path, "a", state="none")
    (killed,) = list_runs(root_dir=str(tmp_path))
    assert (killed["state"], killed["steps"], killed["loss"], killed["tokens"]) == ("killed", 20, 2.6, 640.0)
    assert killed["problems"] == []


def test_a_run_that_was_killed_after_a_resume_is_not_what_its_old_summary_says(tmp_path: Path) -> None:
    make_run(tmp_path, "a", state="preempted", steps=10, last_loss=3.5)
    (killed,) = list_runs(root_dir=str(tmp_path))
    assert (killed["state"], killed["steps"], killed["loss"]) == ("killed", 20, 2.6)


def test_the_seconds_of_a_resumed_run_are_those_of_its_summary_and_else_from_its_first_start(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a", resumed_from_step=10, seconds=12.5)
    (folder / "meta.json").write_text('{"time": "2026-11-20T09:00:00+00:00"}')
    assert list_runs(root_dir=str(tmp_path))[0]["seconds"] == 12.5
    (folder / "summary.json").unlink()
    assert list_runs(root_dir=str(tmp_path))[0]["seconds"] == 1795170061.0 - 1795165200.0


def _train(folder: Path, begun: Event, done: Event) -> None:
    with locked(folder):
        begun.set()
        done.wait(30)


def test_a_run_that_is_being_trained_is_running_and_is_not_disturbed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    context = multiprocessing.get_context("spawn")
    begun, done = context.Event(), context.Event()
    process = context.Process(target=_train, args=(folder, begun, done))
    process.start()
    try:
        assert begun.wait(30)
        assert list_runs(root_dir=str(tmp_path))[0]["state"] == "running"
    finally:
        done.set()
        process.join()
    assert list_runs(root_dir=str(tmp_path))[0]["state"] == "finished"


@pytest.mark.parametrize("file", ["meta.json", "summary.json"])
@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b"[" * 100_000, b'{"time": 5, "steps": "x", "seconds": null}', b"\xff\xfe"),
        b'{"time": %b, "steps": %b}' % (b"9" * 400, b"9" * 400),
    ],
    ids=["empty", "cut", "list", "deep", "types", "bytes", "large"],
)
def test_damaged_files_break_nothing(tmp_path: Path, file: str, content: bytes) -> None:
    folder = make_run(tmp_path, "a")
    make_run(tmp_path, "b", minute=1)
    (folder / file).write_bytes(content)
    runs = {one["id"]: one for one in list_runs(root_dir=str(tmp_path))}
    assert runs["a"]["steps"] == 20
    assert bool(runs["a"]["problems"]) == (b"time" not in content)
    assert all(file in problem for problem in runs["a"]["problems"])
    assert runs["b"]["problems"] == []
    compare_runs(["a", "b"], root_dir=str(tmp_path))


def test_foreign_folders_and_broken_links_are_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, "a")
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "gone").symlink_to("nowhere")
    assert [one["id"] for one in list_runs(root_dir=str(tmp_path))] == ["a"]


def test_a_damaged_config_and_curves_cut_by_a_kill_leave_the_rest(tmp_path: Path) -> None:
    folder = make_run(tmp_path, "a")
    (folder / "config.yaml").write_text("run:\n  name: [\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "train/lo')
    compared = compare_runs(["a"], root_dir=str(tmp_path))
    assert compared["runs"][0]["name"] is None
    assert "config.yaml cannot be read" in compared["runs"][0]["problems"][0]
    assert {"key": "step", "values": [20]} in compared["metrics"]


def test_only_the_end_of_long_curves_is_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": n, "train/loss": n / 10, "pad": "x" * 90}) + "\n" for n in range(9000)))
    assert last_metrics(path)["train/loss"] == 899.9
    assert last_metrics(tmp_path / "none.jsonl") == {}


def test_metrics_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 3, "train/loss": null, "non_finite": {"train/loss": "nan"}}\n')
    assert last_metrics(path) == {"step": 3, "train/loss": "nan"}


def test_sorting_puts_the_best_first_and_the_unknown_last(tmp_path: Path) -> None:
    for minute, (run_id, loss) in enumerate([("a", 2.0), ("b", None), ("c", 1.0)]):
        folder = make_run(tmp_path, run_id, minute=minute, last_loss=loss, steps=20 + minute)
        if loss is None:
            (folder / "metrics.jsonl").unlink()
    assert [one["id"] for one in list_runs(root_dir=str(tmp_path), sort="loss")] == ["c", "a", "b"]
    assert [one["id"] for one in list_runs(root_dir=str(tmp_path), sort="steps")] == ["c", "b", "a"]
    with pytest.raises(ConfigError, match="'size'; it should be one of time, id"):
        list_runs(root_dir=str(tmp_path), sort="size")


def test_a_comparison_shows_where_configs_differ(tmp_path: Path) -> None:
    make_run(tmp_path, "a", minute=1)
    folder = make_run(tmp_path, "b", minute=2, last_loss=2.25)
    with (folder / "config.yaml").open("a") as file:
        file.write("  name: muon\ndata:\n  train: [x, y]\n")
    compared = compare_runs(["a", str(folder)], root_dir=str(tmp_path))
    assert compared["config"] == [
        {"key": "run.name", "values": ["a-name", "b-name"]},
        {"key": "run.seed", "values": [1, 2]},
        {"key": "optimizer.name", "values": [None, "muon"]},
        {"key": "data.train", "values": [None, ["x", "y"]]},
    ]
    assert [one["loss"] for one in compared["runs"]] == [2.5, 2.25]
    assert {"key": "val/bits_per_byte", "values": [1.25, 1.25]} in compared["metrics"]


def test_a_comparison_shows_curves_by_step(tmp_path: Path) -> None:
    for name, offset in (("a", 0.0), ("b", 1.0)):
        folder = make_run(tmp_path, name)
        lines = [{"step": n, "time": 1795170000.0 + n, "train/loss": n + offset} for n in range(1, 101)]
        lines += [{"step": n, "time": 1795170000.0 + n, "val/loss": 2.0 + offset} for n in (50, 100)]
        lines = [line for line in lines if name == "a" or line["step"] <= 50]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = compare_runs(["a", "b"], root_dir=str(tmp_path))["curves"]
    assert [row["step"] for row in curves["train/loss"]] == list(range(10, 101, 10))
    assert curves["train/loss"][1]["values"] == [15.5, 16.5]  # the mean of steps 11 to 20
    assert curves["train/loss"][-1]["values"] == [95.5, None]
    assert curves["val/loss"] == [{"step": 50, "values": [2.0, 3.0]}, {"step": 100, "values": [2.0, None]}]


def test_the_list_is_filtered_by_state_and_by_text(tmp_path: Path) -> None:
    make_run(tmp_path, "a", minute=1)
    make_run(tmp_path, "b", minute=2, state="failed")
    tagged = make_run(tmp_path, "c", minute=3, state="failed")
    meta = json.loads((tagged / "meta.json").read_text())
    (tagged / "meta.json").write_text(json.dumps({**meta, "tags": ["Baseline"], "notes": "with dropout"}))

    def listed(**filters: Any) -> list[str]:
        return [one["id"] for one in list_runs(root_dir=str(tmp_path), **filters)]

    assert listed(states=["failed"]) == ["c", "b"]
    assert listed(states=["failed", "finished"], limit=2) == ["c", "b"]
    assert listed(find="baseLINE") == listed(find="DROPOUT") == ["c"]
    assert listed(find="a-name") == ["a"]
    assert listed(find="a-name", states=["failed"]) == []
    with pytest.raises(ConfigError, match="'done' is no state of a run; it should be one of running, finished"):
        listed(states=["done"])


def test_the_program_lists_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["runs", "--root-dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path} has no runs yet: `llmtrain train CONFIG` makes the first\n"
    for minute, run_id in enumerate(("a", "b")):
        make_run(tmp_path, run_id, minute=minute)
    (tmp_path / "a" / "summary.json").write_text("{")
    assert run(["runs", "--root-dir", str(tmp_path)]) == 0
    head, newest, oldest, _, problem = capsys.readouterr().out.splitlines()
    assert head.split() == ["run", "state", "steps", "loss", "best", "val", "tok/s", "tokens", "time", "age", "size"]
    assert newest.split()[:6] == ["b", "finished", "20", "2.5000", "2.7500", "640"]
    assert oldest.split()[:2] == ["a", "killed"]
    assert problem.startswith("a: summary.json cannot be read")
    assert run(["runs", "a", "b", "--root-dir", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "\nconfig, where it differs\n" in text
    assert [line.split() for line in text.splitlines() if "run.seed" in line] == [["run.seed", "0", "1"]]
    assert run(["runs", "--json", "--root-dir", str(tmp_path)]) == 0
    assert [one["id"] for one in json.loads(capsys.readouterr().out)] == ["b", "a"]
    assert run(["runs", "--root-dir", str(tmp_path / "no")]) == 2
    assert run(["runs", "nobody", "--root-dir", str(tmp_path)]) == 2


@pytest.mark.parametrize(
    ("width", "head"),
    [
        (200, ["run", "state", "steps", "loss", "best", "val", "tok/s", "tokens", "time", "age", "size"]),
        (79, ["run", "state", "steps", "loss", "best", "val", "tok/s", "age"]),
        (45, ["run", "state", "steps", "best", "val", "tok/s", "age"]),
    ],
)
def test_a_narrow_terminal_shows_fewer_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, width: int, head: list[str]
) -> None:
    make_run(tmp_path, "20261121-083912-15083ae-a")
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(["runs", "--root-dir", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[: 1 if width > 45 else 2]).split() == head


def test_the_validation_loss_of_a_step_is_its_newest_value_and_no_mean(tmp_path: Path) -> None:
    run_folder = make_run(tmp_path, "a")
    lines = [
        {"step": step, "time": 1.0 * step, "val/loss": 9 - step / 10, "train/loss": 1.0 * step} for step in range(1, 41)
    ]
    (run_folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = compare_runs(["a"], root_dir=str(tmp_path))["curves"]
    assert [(row["step"], row["values"]) for row in curves["val/loss"]][-2:] == [(36, [5.4]), (40, [5.0])]
    assert [(row["step"], row["values"]) for row in curves["train/loss"]][-1] == (40, [38.5])


def test_what_eval_measured_last_stands_side_by_side(tmp_path: Path) -> None:
    def measured(folder: Path, name: str, document: dict[str, Any]) -> None:
        (folder / "eval" / name).mkdir(parents=True)
        (folder / "eval" / name / "metrics.json").write_text(json.dumps(document))

    first, second = make_run(tmp_path, "a"), make_run(tmp_path, "b")
    measured(first, "20261121-100000", {"data": "test.jsonl", "rows": 3, "scores": {"rougeL": 0.1, "bleu": 1.0}})
    measured(first, "20261121-110000", {"data": "test.jsonl", "rows": 5, "scores": {"rougeL": 0.2}})
    measured(first, "20261121-120000", {"tasks": {"arc": {"scores": {"acc": 0.5}}}})
    measured(second, "20261121-100000", {"data": "test.jsonl", "rows": 5, "scores": {"rougeL": 0.3}})
    rows = {row["key"]: row["values"] for row in compare_runs(["a", "b"], root_dir=str(tmp_path))["evaluations"]}
    assert rows == {
        "data": ["test.jsonl", "test.jsonl"],
        "rows": [5, 5],
        "rougeL": [0.2, 0.3],
        "arc/acc": [0.5, None],
    }


def test_before_the_first_run_there_are_no_runs_and_a_named_folder_has_to_be_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["runs"]) == 0
    assert capsys.readouterr().out == "runs has no runs yet: `llmtrain train CONFIG` makes the first\n"
    assert run(["runs", "--root-dir", "elsewhere"]) == 2
    assert "there is no such folder" in capsys.readouterr().err
