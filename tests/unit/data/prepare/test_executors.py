"""Where tasks run: order, errors, what is kept when workers are lost, and what a node must have."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import pytest

from llmtrain.cli.app import run as run_command
from llmtrain.config.loading.load import load_config
from llmtrain.data.prepare import parallel
from llmtrain.data.prepare.inputs import CorpusInput
from llmtrain.data.prepare.parallel import LocalExecutor, WorkPool, open_executor, ordered_map
from llmtrain.data.prepare.shard_writer import ShardWriter
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.errors import ConfigError, Preempted
from llmtrain.verbs.prepare import prepare as verb
from tests.support.file_server import file_server

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Losing:
    """Runs tasks here until it has written so many shards; from then on no worker comes back."""

    num_workers = 2
    shares_gil = True

    def __init__(self, shards: int) -> None:
        self.shards = shards
        self.is_stopped = threading.Event()

    def check(self, output: Path, inputs: Sequence[CorpusInput]) -> None:
        assert [len(source.files) for source in inputs] == [1]
        assert not output.exists()

    def run(self, task: Callable[[_Item], _Result], item: _Item) -> _Result:
        if isinstance(task, ShardWriter):
            self.shards -= 1
            if self.shards < 0:
                raise Preempted("lost")
        return task(item)

    def stop(self) -> None:
        self.is_stopped.set()


def _config(folder: Path) -> Path:
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * 20}) + "\n" for n in range(200)))
    section = {"input": str(folder / "in.jsonl"), "output": str(folder / "out"), "shard_size": 500, "val_fraction": 0}
    keys = {"prepare": {**section, "tokenizer": {"vocab_size": 280}}, "data": {"name": "tokens", "train": "out/train"}}
    (folder / "config.json").write_text(json.dumps(keys))
    return folder / "config.json"


def test_results_come_in_order_and_the_first_error_stops_the_rest() -> None:
    assert list(ordered_map(lambda n: n * n, range(50), executor=LocalExecutor(3))) == [n * n for n in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(ordered_map(lambda n: 1 // (7 - n), range(50), executor=LocalExecutor(3)))
    executor = _Losing(0)
    pool = WorkPool(executor)
    waiting = pool.submit(lambda _: executor.is_stopped.wait(), None)
    pool.__exit__(KeyboardInterrupt)
    assert waiting.result() is True  # it was told to stop before it was waited for


def test_lost_workers_leave_the_finished_shards(tmp_path: Path) -> None:
    config = load_config(str(_config(tmp_path))).config
    with pytest.raises(Preempted):
        prepare(config, executor=_Losing(3))
    journal = (tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()
    done = [json.loads(line)["shard"]["path"] for line in journal if "shard" in json.loads(line)]
    assert done == [f"train/shard_0000{n}.parquet" for n in range(3)]
    inodes = [(tmp_path / ".out.partial" / path).stat().st_ino for path in done]
    prepare(config)
    assert [(tmp_path / "out" / path).stat().st_ino for path in done] == inodes
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "tokenizer", "train"]


def test_an_address_goes_with_ray(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prepare", str(_config(tmp_path)), "--address", "auto"]) == 2
    assert "--address: it goes with --engine ray" in capsys.readouterr().err


def test_rows_are_tokenised_here(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    model = {"name": "huggingface", "path": "none"}
    keys = {"data": {"name": "chat", "train": str(tmp_path / "rows.jsonl")}, "model": model}
    (tmp_path / "config.json").write_text(json.dumps(keys))
    with pytest.raises(ConfigError, match=r"--engine ray is for text; the rows of data\.name: chat"):
        verb(load_config(str(tmp_path / "config.json")), engine="ray")


def test_without_ray_the_message_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "find_spec", lambda name: None)
    with (
        pytest.raises(ConfigError, match=r"^--engine ray needs Ray: .*\[ray\]"),
        open_executor("ray", num_workers=None),
    ):
        pass


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_a_node_must_have_what_the_driver_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data.prepare import ray_cluster

    monkeypatch.chdir(tmp_path)
    versions = ray_cluster._versions()
    (tmp_path / ".out.ray").write_text("this")
    (tmp_path / "in.txt").write_text("text")

    def fault(
        *, versions: Any = versions, content: str = "this", folder: Path = tmp_path, size: int = 4, file: str = "in.txt"
    ) -> str | None:
        probe = (str(folder / ".out.ray"), content)
        return ray_cluster.find_fault((versions, str(tmp_path), probe, ((file, size),)))

    assert fault() is None
    other = (("llmtrain", "0.0.1"), *versions[1:])
    assert str(fault(versions=other)).startswith(f"runs llmtrain {versions[0][1]}, and this command 0.0.1: install the")
    for unseen in (fault(folder=tmp_path / "none"), fault(content="another cluster's")):
        assert str(unseen).startswith("does not see ")
        assert "set prepare.output to a folder that all nodes share" in str(unseen)
    for changed in (fault(size=5), fault(file="none.txt")):
        assert "put prepare.input into a folder that all nodes share" in str(changed)
    with file_server(tmp_path) as address:
        assert fault(file=f"{address}/in.txt") is None
        assert f"finds 4 bytes at {address}/in.txt, and this command 5" in str(fault(file=f"{address}/in.txt", size=5))
        unseen = fault(file=f"{address}/none.txt")
    assert str(unseen).startswith("cannot read what prepare.input names (")
    if os.geteuid():
        tmp_path.chmod(0o500)
        assert str(fault()).startswith(f"cannot write into {tmp_path} (Permission denied)")
        tmp_path.chmod(0o700)


@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("ray://head:10001", r"^--address ray://head:10001: give HOST:PORT of the head"),
        ("head", "^--address head: give HOST:PORT of the head"),
        ("127.0.0.1:{closed}", r"^--address 127\.0\.0\.1:\d+: no Ray cluster can be reached there \(.*refused"),
    ],
)
def test_an_address_without_a_cluster_is_told_at_once(address: str, told: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = address.format(closed=taken.getsockname()[1])
        with pytest.raises(ConfigError, match=told), open_executor("ray", num_workers=None, address=address):
            pass
