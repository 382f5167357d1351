from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.loading.load import plain_config
from llmtrain.contracts import Unreachable
from llmtrain.tracking import sink_group
from llmtrain.tracking.machine_monitor import SYSTEM_NAMES
from llmtrain.tracking.metric_names import METRIC_NAMES
from llmtrain.tracking.sink_group import SinkGroup
from llmtrain.tracking.sinks import JsonlSink, read_metrics
from llmtrain.tracking.wandb_sink import make_wandb_sink

RUN_INFO: dict[str, Any] = {"run_id": "r", "folder": Path(), "config": {}, "resumed_step": None}


class RecordingSink:
    """Keeps what it is told, in its own time."""

    def __init__(self, *, delay_sec: float = 0.0) -> None:
        self.started: list[Mapping[str, Any]] = []
        self.logged: list[tuple[int, Mapping[str, float]]] = []
        self.finished: list[Mapping[str, Any]] = []
        self._delay_sec = delay_sec

    def start(self, run_info: Mapping[str, Any]) -> None:
        self.started.append(run_info)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        time.sleep(self._delay_sec)
        self.logged.append((step, metrics))

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.finished.append(summary)


class RaisingSink:
    """Fails from `first_bad_step` on; None: at the start."""

    def __init__(self, first_bad_step: int | None) -> None:
        self.calls = 0
        self._first_bad_step = first_bad_step

    def start(self, run_info: Mapping[str, Any]) -> None:
        if self._first_bad_step is None:
            raise ConnectionError("the tracker is down")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.calls += 1
        if self._first_bad_step is None or step >= self._first_bad_step:
            raise ConnectionError("the tracker is down")

    def finish(self, summary: Mapping[str, Any]) -> None:
        self.calls += 1


class BlockedSink:
    """Never comes back from the first step."""

    def __init__(self) -> None:
        self.release = threading.Event()

    def start(self, run_info: Mapping[str, Any]) -> None:
        return None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.release.wait()

    def finish(self, summary: Mapping[str, Any]) -> None:
        return None


class DownSink(RecordingSink):
    """Its tracker does not answer until `comes_up`, and says so each time."""

    def __init__(self) -> None:
        super().__init__()
        self.comes_up = threading.Event()
        self.tries = threading.Semaphore(0)

    def start(self, run_info: Mapping[str, Any]) -> None:
        self.tries.release()
        if not self.comes_up.is_set():
            raise Unreachable("nobody at home")
        super().start(run_info)


@pytest.fixture
def blocked() -> Iterator[BlockedSink]:
    sink = BlockedSink()
    yield sink
    sink.release.set()


def test_a_good_sink_gets_everything_in_order() -> None:
    sink = RecordingSink()
    group = SinkGroup([sink])
    metrics = {"train/loss": 3.0}

    group.start(RUN_INFO)
    for step in range(1, 101):
        metrics["train/loss"] = 1.0 / step
        group.log(step, metrics)
    group.finish({"state": "finished"})

    assert sink.started == [RUN_INFO]
    assert sink.logged == [(step, {"train/loss": 1.0 / step}) for step in range(1, 101)]
    assert sink.finished == [{"state": "finished"}]
    assert group.dropped == {}


@pytest.mark.parametrize(("first_bad_step", "calls", "missed"), [(None, 0, 20), (4, 4, 17)])
def test_a_sink_that_raises_gives_one_warning_and_is_turned_off(
    first_bad_step: int | None, calls: int, missed: int, caplog: pytest.LogCaptureFixture
) -> None:
    bad, good = RaisingSink(first_bad_step), RecordingSink()
    group = SinkGroup([bad, good])

    group.start(RUN_INFO)
    for step in range(1, 21):
        group.log(step, {"train/loss": 1.0})
    group.finish({})

    assert bad.calls == calls
    assert len(good.logged) == 20
    assert len(good.finished) == 1
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    where = "start" if first_bad_step is None else "step 4"
    assert warnings == [
        f"RaisingSink failed at {where} and is off from here on; the run goes on "
        "(ConnectionError: the tracker is down)",
        f"RaisingSink missed {missed} of the run's lines of metrics",
    ]
    assert group.dropped == {"RaisingSink": missed}


def test_a_sink_that_blocks_forever_holds_up_neither_the_loop_nor_the_end(
    blocked: BlockedSink, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    jsonl, good = JsonlSink(tmp_path / "metrics.jsonl"), RecordingSink()
    group = SinkGroup([blocked, jsonl, good], queue_size=100, finish_timeout_sec=0.3)
    group.start(RUN_INFO)

    began = time.monotonic()
    for step in range(1, 501):
        group.log(step, {"train/loss": 1.0})
        while len(good.logged) < step - 50:  # the good one is slower than this loop, and is not the matter here
            time.sleep(0.001)
    logging_sec = time.monotonic() - began
    began = time.monotonic()
    group.finish({})
    finish_sec = time.monotonic() - began

    assert logging_sec < 2
    assert 0.25 < finish_sec < 1
    assert group.dropped == {"BlockedSink": 500}
    assert len(good.logged) == len(read_metrics(tmp_path / "metrics.jsonl")) == 500
    assert len(good.finished) == 1
    assert caplog.text.count("BlockedSink is too slow") == 1
    assert "BlockedSink is still busy" in caplog.text
    assert "BlockedSink missed 500 of" in caplog.text


def test_a_sink_that_never_answers_costs_a_step_less_than_a_hundredth(blocked: BlockedSink) -> None:
    """Of the twelve milliseconds that a step of the tests' tiny model takes; a real one takes longer."""
    group = SinkGroup([blocked], finish_timeout_sec=0.1)
    group.start(RUN_INFO)
    metrics = {f"train/{index}": 1.0 for index in range(30)}
    seconds = []
    for step in range(1, 2001):  # the queue is full from the thousandth on
        began = time.perf_counter()
        group.log(step, metrics)
        seconds.append(time.perf_counter() - began)
    group.finish({})
    assert statistics.median(seconds) < 0.012 / 100


def test_metrics_that_a_slow_sink_misses_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    slow = RecordingSink(delay_sec=0.005)
    group = SinkGroup([slow], queue_size=10)
    group.start(RUN_INFO)

    began = time.monotonic()
    for step in range(1, 201):
        group.log(step, {"train/loss": 1.0})
    logging_sec = time.monotonic() - began
    group.finish({})

    assert logging_sec < 0.2
    assert len(slow.finished) == 1
    assert 5 <= len(slow.logged) < 100
    assert group.dropped == {"RecordingSink": 200 - len(slow.logged)}
    assert caplog.text.count("RecordingSink is too slow") == 1


def test_bad_sinks_leave_the_loss_sequence_bit_for_bit_as_it_is(blocked: BlockedSink) -> None:
    def train(group: SinkGroup) -> list[float]:
        torch.manual_seed(1)
        model = torch.nn.Linear(8, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = []
        group.start(RUN_INFO)
        for step in range(1, 31):
            loss = (model(torch.randn(4, 8)) - torch.rand(4, 1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            group.log(step, {"train/loss": loss.item()})
        group.finish({})
        return losses

    alone = train(SinkGroup([]))
    in_bad_company = train(
        SinkGroup([RaisingSink(5), blocked, RecordingSink(delay_sec=0.01)], queue_size=3, finish_timeout_sec=0.1)
    )

    assert in_bad_company == alone
    assert len(set(alone)) == 30


def test_metrics_wait_for_a_tracker_that_is_down_and_are_all_there_when_it_answers(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sink_group, "_FIRST_PAUSE_SEC", 0.01)
    sink = DownSink()
    group = SinkGroup([sink], finish_timeout_sec=30)
    with caplog.at_level("INFO", "llmtrain"):
        group.start(RUN_INFO)
        for step in range(1, 21):
            group.log(step, {"train/loss": 1.0})
        for _ in range(3):
            assert sink.tries.acquire(timeout=30)
        sink.comes_up.set()
        while not sink.logged:  # a run that ends while the tracker is down would not wait for it
            time.sleep(0.001)
        group.finish({"state": "finished"})

    assert len(sink.started) == len(sink.finished) == 1
    assert [step for step, _ in sink.logged] == list(range(1, 21))
    assert group.dropped == {}
    assert caplog.messages == [
        "DownSink does not answer; its metrics wait, and the run goes on (nobody at home)",
        "DownSink answers again",
    ]


def test_the_end_does_not_wait_for_a_tracker_that_is_down(caplog: pytest.LogCaptureFixture) -> None:
    group = SinkGroup([DownSink()], queue_size=10, finish_timeout_sec=60)
    group.start(RUN_INFO)
    for step in range(1, 21):
        group.log(step, {"train/loss": 1.0})

    began = time.monotonic()
    group.finish({"state": "finished"})

    assert time.monotonic() - began < 30
    assert group.dropped == {"DownSink": 20}
    assert "still busy" not in caplog.text
    assert "DownSink missed 20 of" in caplog.text


@pytest.mark.parametrize("error", [Unreachable("nobody at home"), ValueError("bad")])
def test_a_sink_that_fails_after_the_end_logs_nothing_more(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    class Late(BlockedSink):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            self.release.wait()
            raise error

    late = Late()
    group = SinkGroup([late], finish_timeout_sec=0.1)
    group.start(RUN_INFO)
    group.log(1, {"train/loss": 1.0})
    group.finish({"state": "finished"})
    told = list(caplog.messages)
    (writer,) = [thread for thread in threading.enumerate() if thread.name == "sink-Late"]
    late.release.set()
    writer.join(30)

    assert not writer.is_alive()
    assert caplog.messages == told
    assert told == [
        "Late is still busy; not waiting for it any longer",
        "Late missed 1 of the run's lines of metrics",
    ]


def test_lines_that_a_sink_accepted_but_did_not_send_count_as_missed(caplog: pytest.LogCaptureFixture) -> None:
    class Batching(RecordingSink):
        """Sends at the end, when nobody answers any more."""

        @property
        def num_waiting(self) -> int:
            return len(self.logged)

        def finish(self, summary: Mapping[str, Any]) -> None:
            raise Unreachable("nobody at home")

    group = SinkGroup([Batching()])
    group.start(RUN_INFO)
    for step in range(1, 8):
        group.log(step, {"train/loss": 1.0})
    group.finish({"state": "finished"})

    assert group.dropped == {"Batching": 7}
    assert caplog.messages[-1] == "Batching missed 7 of the run's lines of metrics"


@pytest.mark.parametrize(("state", "longest"), [("preempted", 20), ("failed", 20)])
def test_a_run_that_was_stopped_does_not_wait_long(blocked: BlockedSink, state: str, longest: float) -> None:
    group = SinkGroup([blocked], finish_timeout_sec=600)
    group.start(RUN_INFO)
    group.log(1, {"train/loss": 1.0})

    began = time.monotonic()
    group.finish({"state": state})

    assert time.monotonic() - began < longest


def test_metrics_that_cannot_be_written_do_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").write_text("a file where the folder should be")
    group = SinkGroup([JsonlSink(tmp_path / "run" / "metrics.jsonl")])

    group.start(RUN_INFO)
    group.log(1, {"train/loss": 1.0})
    group.finish({})

    assert group.dropped == {"JsonlSink": 1}
    assert "JsonlSink failed at start" in caplog.text


def test_wandb_that_is_disabled_makes_no_sink_and_an_unknown_mode_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    tracking = plain_config(["tracking.wandb.enabled=true", "tracking.wandb.mode=disabled"]).tracking
    assert make_wandb_sink(tracking, run=tmp_path) is None

    monkeypatch.setenv("WANDB_MODE", "loud")
    with pytest.raises(ValueError, match="WANDB_MODE is loud: set it to online, offline or disabled"):
        make_wandb_sink(plain_config(["tracking.wandb.enabled=true"]).tracking, run=tmp_path)


def test_the_manual_names_every_metric() -> None:
    manual = (Path(__file__).parents[3] / "docs" / "tracking.md").read_text()

    assert [name for name in (*METRIC_NAMES, *SYSTEM_NAMES) if f"`{name}`" not in manual] == []
