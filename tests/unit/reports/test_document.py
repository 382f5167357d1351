"""The report of a run: its document, also of damaged runs, and one file that can run no foreign script."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.reports import run_page
from llmtrain.reports.document import page_document, run_document
from tests.support.recorded_run import BEGAN, recorded_run


def document_in(page: Path) -> Any:
    """The data that the page draws."""
    found = re.search(r'<script type="application/json" id="document">(.*)</script>', page.read_text())
    assert found
    return json.loads(found[1])


def test_a_page_has_all_that_a_run_tells(tmp_path: Path) -> None:
    run_folder = recorded_run(tmp_path, "a", num_steps=100)
    (run_folder / "samples.jsonl").write_text('{"step": 50, "prompt": "a", "completion": "b", "time": 1}\n{"st')
    (run_folder / "eval" / "20261121-100000").mkdir(parents=True)
    (run_folder / "eval" / "20261121-100000" / "metrics.json").write_text('{"rouge1": 0.5}')
    made = run_document(run_folder)
    assert (made["id"], made["name"], made["state"], made["steps"]) == ("a", "a-name", "finished", 100)
    assert made["curves"]["train/loss"]["count"] == 100
    assert made["curves"]["train/loss"]["seconds"][:2] == [1, 2]
    assert made["num_points"] == 10 * 100 + 2 * 3
    assert made["tokens_by_step"] == {"step": list(range(1, 101)), "tokens": [1024 * step for step in range(1, 101)]}
    assert [(event["event"], event["step"], event["details"]) for event in made["events"]] == [
        ("saved", 50, "best"),
        ("saved", 100, "best"),
    ]
    assert made["samples"] == [{"step": 50, "prompt": "a", "completion": "b"}]
    assert made["evaluations"] == [{"name": "20261121-100000", "metrics": {"rouge1": 0.5}}]
    assert made["config"]["optimizer.lr"] == 0.003
    assert made["environment"]["Start"]["command"] == "llmtrain train quickstart optimizer.lr=0.003"
    assert made["data"] == [{"split": "train", "source": "shards/train"}]
    assert made["problems"] == []
    assert "folder" not in made


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", "meta.json", "summary.json", "config.yaml"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": 1, "ti', b"[]\n", b"\xff\xfe\x00", b'{"time": {}, "git": 3}\n']
)
def test_damaged_files_leave_the_rest_of_the_page(tmp_path: Path, name: str, content: bytes) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=60)
    (folder / name).write_bytes(content)
    run_page.write_report([folder], tmp_path / "page.html")
    (made,) = document_in(tmp_path / "page.html")["runs"]
    assert made["id"] == "a"
    if name != "metrics.jsonl":
        assert made["curves"]["train/loss"]["count"] == 60


def test_a_metrics_file_cut_in_the_middle_of_a_line_still_reports(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = recorded_run(tmp_path, "a", num_steps=30, state="killed") / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-17])
    assert run(["report", "a", "--root-dir", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["points"], told["problems"]) == (29 * 10, [])
    assert document_in(tmp_path / "a" / "report.html")["runs"][0]["state"] == "killed"


def test_metrics_that_are_not_finite_are_events(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=10)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": 11, "time": {BEGAN + 11}, "train/loss": null, "non_finite": {{"train/loss": "nan"}}}}\n')
    made = run_document(folder)
    assert made["events"] == [{"step": 11, "event": "non-finite", "details": "train/loss was nan"}]
    assert made["curves"]["train/loss"]["count"] == 10


def test_several_runs_stand_beside_each_other_with_what_differs(tmp_path: Path) -> None:
    folders = [recorded_run(tmp_path, name, lr=lr) for name, lr in (("a", 0.001), ("b", 0.002))]
    made = page_document(folders)
    assert [one["id"] for one in made["runs"]] == ["a", "b"]
    assert made["differences"] == [
        {"key": "run.name", "values": ["a-name", "b-name"]},
        {"key": "optimizer.lr", "values": [0.001, 0.002]},
    ]


def test_the_page_is_one_file_whose_scripts_are_the_only_ones_that_may_run(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=10)
    meta = json.loads((folder / "meta.json").read_text())
    meta["notes"] = "</script><script>alert(1)</script>"
    (folder / "meta.json").write_text(json.dumps(meta))
    run_page.write_report([folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    assert found
    policy = html.unescape(found[1])
    allowed = set(re.findall(r"'sha256-([^']*)'", policy))
    assert {base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() for one in scripts} == allowed
    assert len(scripts) == 6
    assert "alert(1)" not in "".join(scripts)
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"<(?:link|img|iframe|script)[^>]+(?:src|href)=", page.replace("".join(scripts), ""))
    assert document_in(tmp_path / "page.html")["runs"][0]["notes"] == meta["notes"]


def test_secrets_stay_out_of_the_page(tmp_path: Path) -> None:
    folder = recorded_run(tmp_path, "a", num_steps=10)
    with (folder / "config.yaml").open("a") as file:
        file.write("tracking:\n  wandb:\n    api_key: very-private\n")
    run_page.write_report([folder], tmp_path / "page.html")
    assert "very-private" not in (tmp_path / "page.html").read_text()
    assert document_in(tmp_path / "page.html")["runs"][0]["config"]["tracking.wandb.api_key"] == "***"


def test_the_program_writes_one_page_for_a_run_and_one_for_several(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        recorded_run(tmp_path / "runs", name, num_steps=10)
    assert run(["report", "b"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'runs' / 'b' / 'report.html'} (")
    assert run(["report", "a", "b"]) == 0
    assert [one["id"] for one in document_in(tmp_path / "report.html")["runs"]] == ["a", "b"]
    assert run(["report", "a", "--output", "none/x.html"]) == 2
    assert "none/x.html: cannot be written" in capsys.readouterr().err
    assert run(["report", "c"]) == 2
    assert "there is no run 'c'" in capsys.readouterr().err


def test_a_report_that_fails_at_the_end_of_a_run_is_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("something unforeseen")

    folder = recorded_run(tmp_path, "a", num_steps=10)
    monkeypatch.setattr(run_page, "page_document", fail)
    run_page.report_at_end(folder)
    (record,) = caplog.records
    assert "report.html could not be made (ValueError: something unforeseen)" in record.getMessage()


def test_of_an_evaluation_of_rows_its_scores_are_shown_and_no_rows(tmp_path: Path) -> None:
    run_folder = recorded_run(tmp_path, "a", num_steps=5)
    scores = {"loss": 1.5, "rougeL": 0.25}
    document = {
        "time": "2026-11-21T10:00:00+00:00",
        "baseline": None,
        "rows": 10,
        "scores": scores,
        "files": {"a.jsonl": {"rows": 10, "scores": scores, "comparison": {}}},
        "contamination": {"checked": True, "rows": 1, "exact": 0, "named": ["a.jsonl:1 = train.jsonl:7 (13-gram)"]},
        "got_worse": {"rougeL": ["a.jsonl:3"]},
        "settings": {"max_new_tokens": 256},
    }
    (run_folder / "eval" / "20261121-110000").mkdir(parents=True)
    (run_folder / "eval" / "20261121-110000" / "metrics.json").write_text(json.dumps(document))
    shown = run_document(run_folder)["evaluations"][-1]
    assert shown["name"] == "20261121-110000"
    assert (shown["rows"], shown["scores"]) == (10, scores)
    assert shown["files"] == {"a.jsonl": {"rows": 10, "scores": scores}}
    assert shown["contamination"] == {"checked": True, "rows": 1, "exact": 0}
    assert not {"got_worse", "settings"} & shown.keys()


def test_samples_of_a_step_that_came_twice_are_the_later_ones_in_the_order_of_steps(tmp_path: Path) -> None:
    run_folder = recorded_run(tmp_path, "a", num_steps=5)
    lines = [(50, "a", "1"), (100, "a", "2"), (100, "b", "3"), (50, "a", "4"), ("x", "a", "5")]
    text = "".join(json.dumps({"step": s, "prompt": p, "completion": c}) + "\n" for s, p, c in lines)
    (run_folder / "samples.jsonl").write_text(text)
    shown = [(one["step"], one["prompt"], one["completion"]) for one in run_document(run_folder)["samples"]]
    assert shown == [(50, "a", "4"), (100, "a", "2"), (100, "b", "3")]
    (run_folder / "samples.jsonl").write_text('{"step": 1, "prompt": "Hi", "completion": "Ho", "turn": true}\n')
    assert run_document(run_folder)["samples"] == [{"step": 1, "prompt": "Hi", "completion": "Ho", "turn": True}]
