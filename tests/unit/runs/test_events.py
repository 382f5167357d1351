"""events.jsonl: what is told is there at once; neither a torn line nor a full disk harms anything."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from llmtrain.runs.events import EventLog, read_events


def test_events_are_told_in_order_with_their_details(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.add("saved", step=10, best=True)
    EventLog(tmp_path / "events.jsonl").add("resumed", step=10)
    saved, resumed = read_events(tmp_path / "events.jsonl")
    assert (saved["event"], saved["step"], saved["best"]) == ("saved", 10, True)
    assert resumed["event"] == "resumed"
    assert 0 <= resumed["time"] - saved["time"] < 60


def test_what_follows_a_torn_line_is_not_lost_with_it(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"time": 1, "step": 1, "event": "saved"}\n{"time": 2, "st')
    EventLog(path).add("resumed", step=1)
    assert [event["event"] for event in read_events(path)] == ["saved", "resumed"]
    path.write_text('[1]\n{"event": 5}\n')
    assert read_events(path) == []


def test_a_file_that_cannot_be_written_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = EventLog(tmp_path / "none" / "events.jsonl")
    with caplog.at_level(logging.WARNING, logger="llmtrain"):
        log.add("saved", step=1)
        log.add("saved", step=2)
    assert len(caplog.records) == 1
    assert "the run goes on without it" in caplog.text
    assert read_events(tmp_path / "none" / "events.jsonl") == []
    (tmp_path / "none").mkdir()
    log.add("saved", step=3)
    assert [event["step"] for event in read_events(tmp_path / "none" / "events.jsonl")] == [3]


def test_ranks_that_write_nothing_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    EventLog(None).add("saved", step=1)
    assert list(tmp_path.iterdir()) == []
