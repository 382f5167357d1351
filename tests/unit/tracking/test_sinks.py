from __future__ import annotations

import errno
import json
import math
import subprocess
import sys
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmtrain.tracking import sinks
from llmtrain.tracking.sinks import JsonlSink, TensorBoardSink, read_metrics


def run_info(folder: Path, *, resumed_step: int | None = None) -> dict[str, Any]:
    return {"run_id": "r", "folder": folder, "config": {}, "resumed_step": resumed_step}


def write_steps(path: Path, steps: range, *, resumed_step: int | None = None, loss: float = 1.0) -> None:
    sink = JsonlSink(path)
    sink.start(run_info(path.parent, resumed_step=resumed_step))
    for step in steps:
        sink.log(step, {"train/loss": loss})
    sink.finish({})


def strict_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line: dict[str, Any] = json.loads(text, parse_constant=refuse)
    return line


def test_each_line_is_in_the_file_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(run_info(tmp_path))
    sink.log(10, {"train/loss": 0.1 + 0.2, "train/lr": 3e-4})

    line = strict_json((tmp_path / "metrics.jsonl").read_text())

    assert list(line) == ["step", "time", "train/loss", "train/lr"]
    assert (line["step"], line["train/loss"], line["train/lr"]) == (10, 0.1 + 0.2, 3e-4)
    assert 1.7e9 < line["time"] < 1e10
    sink.finish({})


def test_a_value_that_is_not_finite_is_null_and_named_under_non_finite(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(run_info(tmp_path))
    sink.log(1, {"train/loss": math.nan, "train/grad_norm": -math.inf, "train/lr": 1e-3})
    sink.finish({})

    line = strict_json((tmp_path / "metrics.jsonl").read_text())

    assert (line["train/loss"], line["train/grad_norm"], line["train/lr"]) == (None, None, 1e-3)
    assert line["non_finite"] == {"train/loss": "nan", "train/grad_norm": "-inf"}


class FullDisk(FileIO):
    """A file on a disk with room for so many bytes more."""

    room = 0

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_lines_wait_while_the_disk_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sinks, "FileIO", FullDisk)
    monkeypatch.setattr(FullDisk, "room", 90)  # one line and a part of the next
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(run_info(tmp_path))
    for step in (1, 2, 3):
        sink.log(step, {"train/loss": 1.0})
    on_disk = (tmp_path / "metrics.jsonl").read_text()
    assert sink._file is not None
    sink._file.room = 10_000  # type: ignore[attr-defined]
    sink.log(4, {"train/loss": 1.0})
    sink.finish({})

    assert on_disk.count("\n") == 1
    assert strict_json(on_disk)["step"] == 1
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
    assert caplog.messages == [
        f"{tmp_path}/metrics.jsonl cannot be written; its lines wait in memory (No space left on device)"
    ]


def test_lines_that_are_left_over_at_the_end_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "FileIO", FullDisk)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.start(run_info(tmp_path))
    for step in (1, 2, 3):
        sink.log(step, {"train/loss": 1.0})

    sink.finish({})

    assert sink.num_waiting == 3


def test_a_new_run_never_overwrites_metrics(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))

    with pytest.raises(FileExistsError):
        JsonlSink(path).start(run_info(tmp_path))

    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 9), loss=1.0)
    write_steps(path, range(6, 11), resumed_step=5, loss=2.0)

    lines = read_metrics(path)

    assert [line["step"] for line in lines] == list(range(1, 11))
    assert [line["train/loss"] for line in lines] == [1.0] * 5 + [2.0] * 5
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl"]


def test_a_run_that_starts_over_at_step_0_keeps_no_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 4))
    write_steps(path, range(1, 3), resumed_step=0, loss=2.0)

    assert [(line["step"], line["train/loss"]) for line in read_metrics(path)] == [(1, 2.0), (2, 2.0)]


def test_a_resumed_run_whose_metrics_are_gone_begins_a_new_file(tmp_path: Path) -> None:
    write_steps(tmp_path / "metrics.jsonl", range(6, 8), resumed_step=5)

    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [6, 7]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_file_cut_at_any_byte_is_continued_to_valid_lines(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write_steps(path, range(1, 9))
    whole = path.read_bytes()
    cut = min(data.draw(st.integers(0, 500), label="cut"), len(whole))
    resumed_step = data.draw(st.integers(0, 8), label="resumed_step")
    path.write_bytes(whole[:cut])

    write_steps(path, range(resumed_step + 1, 10), resumed_step=resumed_step)

    ends = [len(b"\n".join(whole.split(b"\n")[:number])) for number in range(1, 9)]
    survivors = [step for step, end in enumerate(ends, start=1) if end <= cut and step <= resumed_step]
    lines = [strict_json(text) for text in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == survivors + list(range(resumed_step + 1, 10))


def test_damage_in_the_middle_costs_one_line_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    write_steps(path, range(1, 5))
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], b"\0" * 40, *lines[2:]]))

    write_steps(path, range(5, 6), resumed_step=4)

    assert [line["step"] for line in read_metrics(path)] == [1, 3, 4, 5]
    assert f"{path}:2 is cut off or damaged" in caplog.text


def test_tensorboard_shows_each_step_of_a_resumed_run_once(tmp_path: Path) -> None:
    for steps, resumed_step, loss in ((range(1, 9), None, 1.0), (range(6, 11), 5, 2.0)):
        sink = TensorBoardSink(tmp_path)
        sink.start(run_info(tmp_path, resumed_step=resumed_step))
        for step in steps:
            sink.log(step, {"train/loss": loss, "val/bits_per_byte": 1.5})
        sink.finish({})

    events = EventAccumulator(str(tmp_path))
    events.Reload()

    assert sorted(events.Tags()["scalars"]) == ["train/loss", "val/bits_per_byte"]
    points = [(point.step, point.value) for point in events.Scalars("train/loss")]
    assert points == [(step, 1.0) for step in range(1, 6)] + [(step, 2.0) for step in range(6, 11)]


def test_tensorboard_does_not_import_an_installed_tensorflow(tmp_path: Path) -> None:
    (tmp_path / "tensorflow.py").write_text("raise SystemExit('tensorflow was imported')\n")
    code = "import sys; from pathlib import Path; from llmtrain.tracking.sinks import TensorBoardSink as Sink;"
    code += (
        f"sink = Sink(Path({str(tmp_path / 'tb')!r})); sink.start({{'resumed_step': None}}); sink.log(1, {{'a': 1.0}});"
    )
    code += "sink.finish({}); print('tensorflow' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {code}"],
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.stdout, done.returncode) == ("False\n", 0), done.stderr


def test_progress_logs_and_sinks_import_neither_torch_nor_tensorboard() -> None:
    code = "import sys, llmtrain.tracking.progress, llmtrain.tracking.logs, llmtrain.tracking.sink_group as _, "
    code += "llmtrain.tracking.redaction, llmtrain.tracking.times, llmtrain.runs.summary, llmtrain.tracking.system;"
    code += "print([name for name in ('torch', 'tensorboard', 'numpy', 'lightning_fabric') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"
