"""Runs with trackers: what MLflow and W&B hold afterwards, and runs whose tracker is not there."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError, Preempted
from llmtrain.installing import install_extra
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash

pytestmark = pytest.mark.slow

SECRET = "hf_" + "x1y2z3" * 5


@pytest.fixture(autouse=True)
def _no_tracker_of_the_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "WANDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def train_run(config_file: Path, *overrides: str, run_id: str, resume: str | None = None) -> Path:
    loaded = load_config(str(config_file), [*overrides, f"output.run_id={run_id}"])
    return Path(train(loaded, resume=resume)["run"])


def losses(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["train/loss"]) for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]


def warnings(run: Path) -> list[str]:
    text = (run / "logs" / "train.log").read_text()
    return [line.partition("] ")[2] for line in text.splitlines() if " WARN " in line]


# -- MLflow ------------------------------------------------------------------------------------------------------------


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """A real MLflow server on loopback, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 240
        while not answers(f"{address}/health"):
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(server.pid, 15)
        server.wait(30)


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def test_mlflow_on_a_server_holds_the_run_and_a_resume_goes_on_in_the_same_one(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    with mlflow_server(tmp_path / "server") as address:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "stories")
        keys = ["tracking.mlflow.enabled=true", "tracking.mlflow.log_models=true", "tracking.finish_timeout_sec=300"]
        about = [f"run.notes=with {SECRET}", "run.tags=[small]"]
        monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=12")
        with pytest.raises(Preempted):
            train_run(config_file, *keys, *about, run_id="r")
        monkeypatch.delenv("LLMTRAIN_FAULTS")
        client = MlflowClient(address)
        experiment = client.get_experiment_by_name("stories")
        assert experiment is not None
        (stopped,) = client.search_runs([experiment.experiment_id])
        assert stopped.info.status == "KILLED"

        run = train_run(config_file, *keys, *about, run_id="r", resume="r")

        (found,) = client.search_runs([experiment.experiment_id])
        points = client.get_metric_history(found.info.run_id, "train/loss")
        validation = client.get_metric_history(found.info.run_id, "val/loss")
        artifacts = {file.path for file in client.list_artifacts(found.info.run_id, "model")}
        config = Path(client.download_artifacts(found.info.run_id, "config.yaml", str(tmp_path))).read_text()

    assert (found.info.run_id, found.info.run_name, found.info.status) == (stopped.info.run_id, "r", "FINISHED")
    assert sorted((point.step, point.value) for point in points) == losses(run)
    assert [point.step for point in sorted(validation, key=lambda point: point.step)] == [10, 20, 30]
    assert found.data.params["model.d_model"] == "32"
    assert found.data.params["trainer.max_steps"] == "30"
    assert found.data.tags["tag.small"] == "true"
    assert {"model/config.json", "model/model.safetensors"} <= artifacts
    assert "d_model: 32" in config
    everything = config + json.dumps([dict(found.data.params), dict(found.data.tags)])
    assert "with ***" in everything
    assert SECRET not in everything
    assert "mlflow.source.name" not in found.data.tags
    assert warnings(run)[-1:] != ["MlflowSink"]


@pytest.mark.parametrize("uri", ["mlruns", "sqlite:///here.db", None])
def test_mlflow_in_a_folder_or_a_database(
    config_file: Path, tmp_path: Path, uri: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    keys = ["tracking.mlflow.enabled=true", "tracking.mlflow.run_name=mine", "tracking.finish_timeout_sec=300"]
    keys += [f"tracking.mlflow.tracking_uri={uri}"] if uri else []
    run = train_run(config_file, *keys, run_id="r")

    place = {"mlruns": f"file://{tmp_path}/mlruns", None: f"sqlite:///{tmp_path}/mlflow.db"}.get(
        uri, f"sqlite:///{tmp_path}/here.db"
    )
    recorded = json.loads((run / "tracking" / "mlflow.json").read_text())
    client = MlflowClient(place)
    found = client.get_run(recorded["run_id"])
    assert recorded["tracking_uri"] == place
    assert (found.info.run_name, found.info.status) == ("mine", "FINISHED")
    assert len(client.get_metric_history(recorded["run_id"], "train/loss")) == 30
    assert warnings(run) == []


def test_a_server_that_refuses_and_one_that_never_answers_change_nothing(config_file: Path) -> None:
    alone = train_run(config_file, run_id="alone")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        addresses = {
            "refuses": "http://127.0.0.1:1",  # nothing listens there
            "silent": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        for name, address in addresses.items():
            began = time.monotonic()
            run = train_run(
                config_file,
                "tracking.mlflow.enabled=true",
                f"tracking.mlflow.tracking_uri={address}",
                "tracking.finish_timeout_sec=2",
                run_id=name,
            )
            assert time.monotonic() - began < 60
            assert losses(run) == losses(alone)
            told = warnings(run)
            assert sum("MlflowSink" in line for line in told) == len(told) == 2
            assert told[-1].startswith("MlflowSink missed 3")  # 30 steps and 3 evaluations
        refused = warnings(config_file.parent / "runs" / "refuses")
    assert "does not answer; its metrics wait, and the run goes on (http://127.0.0.1:1: " in refused[0]
    assert "Connection refused" in refused[0]


# -- the machine -------------------------------------------------------------------------------------------------------


def test_metrics_of_the_machine_stand_beside_those_of_training(config_file: Path) -> None:
    run = train_run(config_file, "tracking.system_interval_sec=0.01", run_id="r")

    lines = [line for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
    groups = {name.partition("/")[0] for line in lines for name in line if "/" in name}
    assert groups == {"train", "perf", "system"}
    assert all({"perf/data_wait", "perf/goodput"} <= set(line) for line in lines)
    assert any("system/rss_gb" in line for line in lines)
    assert 0 < lines[-1]["perf/goodput"] < 1


# -- W&B ---------------------------------------------------------------------------------------------------------------


def wandb_records(folder: Path) -> list[Any]:
    """The records of an offline run, by the format of its file: a log of LevelDB's kind, of protobuf messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("run-*.wandb")
    data, position, pieces, records = file.read_bytes(), 7, b"", []
    block = 32768
    while position + 7 <= len(data):
        if block - position % block < 7:
            position += block - position % block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        pieces += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = Record()
            record.ParseFromString(pieces)
            records.append(record)
            pieces = b""
    return records


def whole_records(folder: Path) -> list[Any]:
    """The records once the last is there: W&B's own process may still be writing when a run has ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        records = wandb_records(folder)
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{folder} has no end")


def history(records: list[Any]) -> list[dict[str, Any]]:
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [{(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in row.item} for row in rows]


def test_wandb_offline_wrote_the_run_and_nothing_about_the_process(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_PROJECT", "stories")
    monkeypatch.setattr(sys, "argv", ["llmtrain", "train", "--marker-of-the-command-line"])
    keys = ["tracking.wandb.enabled=true", f"run.notes=with {SECRET}", "tracking.finish_timeout_sec=300"]
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=12")
    with pytest.raises(Preempted):
        train_run(config_file, *keys, run_id="r")
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    (stopped,) = (config_file.parent / "runs" / "r" / "wandb").glob("offline-run-*")

    run = train_run(config_file, *keys, run_id="r", resume="r")

    (resumed,) = set((run / "wandb").glob("offline-run-*")) - {stopped}
    first, second = whole_records(stopped), whole_records(resumed)
    rows = [*history(first), *history(second)]
    begun = [record.run for record in (*first, *second) if record.WhichOneof("record_type") == "run"]
    config = {update.key: json.loads(update.value_json) for update in begun[0].config.update}
    assert len({record.run_id for record in begun}) == 1
    assert (begun[0].project, begun[0].display_name) == ("stories", "r")
    assert [(row["_step"], row["train/loss"]) for row in rows if "train/loss" in row] == losses(run)
    assert [row["_step"] for row in rows if "val/loss" in row] == [10, 20, 30]
    assert config["model"]["d_model"] == 32
    assert config["run"]["notes"] == "with ***"
    for file in (run / "wandb").rglob("*"):
        if file.is_file():
            assert SECRET.encode() not in file.read_bytes(), file
            assert b"marker-of-the-command-line" not in file.read_bytes(), file
    kinds = {record.WhichOneof("record_type") for record in (*first, *second)}
    assert not kinds & {"stats", "output", "output_raw"}
    assert not list((run / "wandb").rglob("requirements.txt"))
    saving, reason = warnings(run)
    assert saving == "SIGTERM: saving step 12, then stopping"
    assert reason.startswith("step 12 is saved; to go on: llmtrain train --resume ")


def test_wandb_that_nobody_is_logged_in_to_is_one_warning(config_file: Path) -> None:
    run = train_run(config_file, "tracking.wandb.enabled=true", run_id="r")

    assert warnings(run) == [
        "WandbSink failed at start and is off from here on; the run goes on (ValueError: nobody is logged in: "
        "run `wandb login`, set WANDB_API_KEY, or set tracking.wandb.mode=offline)",
        "WandbSink missed 33 of the run's lines of metrics",
    ]
    assert len(losses(run)) == 30


def test_wandb_whose_server_refuses_changes_nothing(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    wandb.teardown()  # an offline run of this process before this one would leave it offline
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")  # nothing listens there
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    alone = train_run(config_file, run_id="alone")

    run = train_run(config_file, "tracking.wandb.enabled=true", "tracking.finish_timeout_sec=120", run_id="refused")

    assert losses(run) == losses(alone)
    told = warnings(run)
    assert told[0].startswith("WandbSink does not answer; ")
    assert told[1:] == ["WandbSink missed 33 of the run's lines of metrics"]


# -- both, and others --------------------------------------------------------------------------------------------------


def test_several_trackers_at_once_leave_the_losses_as_they_are(config_file: Path) -> None:
    alone = train_run(config_file, run_id="alone")
    keys = ["tracking.tensorboard.enabled=true", "tracking.mlflow.enabled=true", "tracking.wandb.enabled=true"]
    keys += ["tracking.wandb.mode=offline", "tracking.finish_timeout_sec=300"]

    run = train_run(config_file, *keys, run_id="all")

    assert losses(run) == losses(alone)
    assert (run / "tensorboard").is_dir()
    assert sorted(path.name for path in (run / "tracking").iterdir()) == ["mlflow.json", "wandb.json"]


def test_a_tracker_that_is_not_installed_is_one_warning_with_the_install_line(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = train_run(config_file, run_id="alone")
    for package in ("mlflow", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)

    run = train_run(config_file, "tracking.mlflow.enabled=true", "tracking.wandb.enabled=true", run_id="r")

    assert warnings(run) == [
        f"MLflow is not installed: {install_extra('mlflow')}. The run goes on without it",
        f"W&B is not installed: {install_extra('wandb')}. The run goes on without it",
    ]
    assert losses(run) == losses(alone)


class FullDisk(FileIO):
    """A file on a disk that has room for a few lines."""

    def __init__(self, file: Path, mode: str) -> None:
        super().__init__(file, mode)
        self.room = 1000

    def write(self, data: Any) -> int:
        written = super().write(data[: self.room])
        self.room -= written
        return written


def test_a_full_disk_costs_one_warning_and_no_loss(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = train_run(config_file, run_id="alone")

    def refuse(writer: object, event: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("llmtrain.tracking.sinks.FileIO", FullDisk)
    monkeypatch.setattr("tensorboard.summary.writer.record_writer.RecordWriter.write", refuse)

    run = train_run(config_file, "tracking.tensorboard.enabled=true", run_id="full")

    assert weight_hash(run) == weight_hash(alone)
    kept = len(read_metrics(run / "metrics.jsonl"))
    assert losses(run) == losses(alone)[: len(losses(run))]
    assert 1 <= kept < 10
    jsonl, board = ([line for line in warnings(run) if name in line] for name in ("etrics.jsonl", "TensorBoardSink"))
    assert jsonl == [
        f"{run}/metrics.jsonl cannot be written; its lines wait in memory (No space left on device)",
    ]
    assert "TensorBoardSink failed at " in board[0]
    assert "No space left on device" in board[0]
    assert re.fullmatch(r"TensorBoardSink missed \d+ of the run's lines of metrics", board[1])
    assert warnings(run)[-2:] == [f"JsonlSink missed {33 - kept} of the run's lines of metrics", board[1]]
    assert len(warnings(run)) == 4


OWN_SINK = """
import json
from pathlib import Path

class MySink:
    def __init__(self, file, flush=False):
        self.file = Path(file).open("w")

    def start(self, run_info):
        self.run_id = run_info["run_id"]

    def log(self, step, metrics):
        self.file.write(json.dumps([self.run_id, step, sorted(metrics)]) + "\\n")

    def finish(self, summary):
        self.file.write(summary["state"])
        self.file.close()
"""


def test_a_sink_of_the_users_own_gets_every_line(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "my_sinks.py").write_text(OWN_SINK)
    own = f"tracking.sinks=[{{name: 'my_sinks:MySink', options: {{file: {tmp_path}/out}}}}]"

    run = train_run(config_file, own, run_id="r")

    *lines, state = (tmp_path / "out").read_text().splitlines()
    told = [json.loads(line) for line in lines]
    assert [(name, step) for name, step, _ in told] == [
        ("r", line["step"]) for line in read_metrics(run / "metrics.jsonl")
    ]
    assert "train/loss" in told[0][2]
    assert state == "finished"


@pytest.mark.parametrize(
    ("sink", "message"),
    [
        ("{name: 'nowhere:Sink'}", "tracking.sinks: nowhere cannot be imported"),
        ("{name: 'json:Sink'}", "tracking.sinks: json has no function or class 'Sink'"),
    ],
)
def test_a_sink_that_cannot_be_imported_is_refused_before_there_is_a_run(
    config_file: Path, sink: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_run(config_file, f"tracking.sinks=[{sink}]", run_id="r")
    assert not (config_file.parent / "runs").exists()
