"""Sinks for a run's metrics: metrics.jsonl always, TensorBoard by default; other trackers have files of their own.

A sink is constructed in the main thread before data workers fork, where it imports what it needs and reports faults of
its set-up. `start` and later calls may be slow. `sink_group` keeps a sink's errors away from the training loop.

A resumed run begins after `run_info["resumed_step"]`: lines of later steps, from an earlier process, are removed.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llmtrain.atomic import replacing

if TYPE_CHECKING:
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

log = logging.getLogger("llmtrain.tracking")


class JsonlSink:
    """Writes one JSON object a line at once: `{"step": 10, "time": 1795216293.125, "train/loss": 3.21}`.

    `time` is in seconds since 1970. JSON has no NaN and no infinity: such a metric is null, and `non_finite` has its
    value as text: `{"train/loss": null, "non_finite": {"train/loss": "nan"}}`. Lines that cannot be written (a full
    disk) are kept in memory and written later, since this file is the run's record.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: FileIO | None = None
        self._size = 0
        self._waiting: list[bytes] = []

    @property
    def num_waiting(self) -> int:
        """Number of lines that could not be written yet."""
        return len(self._waiting)

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Open the file; a resumed run keeps the lines up to its step. Raises FileExistsError if a new run has one."""
        resumed_step: int | None = run_info["resumed_step"]
        if resumed_step is not None and self._path.exists():
            _drop_lines_after(self._path, step=resumed_step)
            self._file = FileIO(self._path, "a")
        else:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._path, "x")
        self._size = os.fstat(self._file.fileno()).st_size

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line."""
        assert self._file is not None, "start comes first"
        line = {"step": step, "time": round(time.time(), 3), **json_metrics(metrics)}
        self._waiting.append(json.dumps(line, allow_nan=False).encode() + b"\n")
        could_write = len(self._waiting) == 1
        try:
            self._write()
        except OSError as error:
            if could_write:
                log.warning("%s cannot be written; its lines wait in memory (%s)", self._path, error.strerror)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the file, after another try to write the waiting lines. The summary has a file of its own."""
        if self._file is not None:
            with suppress(OSError):
                self._write()
            self._file.close()
            self._file = None

    def _write(self) -> None:
        """Append all waiting lines, or none of them. Raises OSError."""
        assert self._file is not None
        data = b"".join(self._waiting)
        try:
            written = self._file.write(data)
            if written != len(data):  # the disk became full meanwhile
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self._file.truncate(self._size)
                self._file.seek(self._size)
            raise
        self._size += len(data)
        self._waiting.clear()


class TensorBoardSink:
    """Writes event files for TensorBoard, with the metrics' own names. A line is in the file as soon as it is logged.

    TensorBoard's own writer has a thread, whose errors (a full disk) print a traceback and do not reach the caller. So
    only its record writer and its protobuf messages are used.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        _import_tensorboard()
        self._file: RecordWriter | None = None

    def start(self, run_info: Mapping[str, Any]) -> None:
        """Open a new event file. After a resume, it makes TensorBoard drop earlier points after the resumed step."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}"
        path = self._folder / name
        number = 0
        while path.exists():  # the run was resumed within the same second
            path, number = self._folder / f"{name}.{number}", number + 1
        self._file = RecordWriter(FileIO(path, "x"))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        resumed_step: int | None = run_info["resumed_step"]
        if resumed_step is not None:
            begun = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=resumed_step + 1, session_log=begun))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point for each metric."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, event: Event) -> None:
        assert self._file is not None, "start comes first"
        self._file.write(event.SerializeToString())


def json_metrics(metrics: Mapping[str, float]) -> dict[str, Any]:
    """Return `metrics` for JSON: a value that is not finite becomes null, and is a text under `non_finite`."""
    values: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    non_finite = {name: str(float(value)) for name, value in metrics.items() if not math.isfinite(value)}
    return values | {"non_finite": non_finite} if non_finite else values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a metrics.jsonl in order. A line damaged by a kill or power cut is skipped with a warning."""
    return [line for _, line in _readable_lines(path)]


def _readable_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                log.warning("%s:%d is cut off or damaged, and is skipped", path, number)
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                yield text.rstrip("\n"), line


def _drop_lines_after(path: Path, *, step: int) -> None:
    """Remove the lines after `step`. A new file replaces the old one, so that a kill loses no line."""
    with replacing(path) as file:
        file.writelines(f"{text}\n".encode() for text, line in _readable_lines(path) if line["step"] <= step)


def _import_tensorboard() -> None:
    """Import TensorBoard in the main thread, before training. Raises ImportError if it is not installed."""
    # If tensorflow is installed, TensorBoard imports it to write files, which takes seconds and GPU memory. A module of
    # this name turns that off (tensorboard/compat/__init__.py).
    sys.modules.setdefault("tensorboard.compat.notf", ModuleType("tensorboard.compat.notf"))
    import tensorboard.compat.proto.event_pb2
    import tensorboard.summary.writer.record_writer  # noqa: F401
