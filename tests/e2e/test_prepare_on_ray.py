"""Text prepared on a Ray cluster of two nodes: the same bytes, whatever is killed, and the same messages."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.schema import Config
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.errors import ConfigError, Preempted
from llmtrain.faults import VARIABLE
from tests.support.file_server import file_server
from tests.support.planted_duplicates import plant

pytestmark = [pytest.mark.slow, pytest.mark.processes]

SMALL_NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}
ADAPTER = """
import os
import time


def read(row):
    stage = "encode" if os.path.isdir(".out.partial/work") else "read"
    if row["text"].startswith("hold") and not os.path.exists(f"go-{stage}"):
        open(f"held-{stage}-{os.getpid()}", "w").close()
        while not os.path.exists(f"go-{stage}"):
            time.sleep(0.01)
    return row["text"]
"""
"""Holds up the worker that reads certain rows, until a file says go on."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of one small node; tests add others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "src"))
        from ray.cluster_utils import Cluster

        head = {**SMALL_NODE, "include_dashboard": False, "include_log_monitor": False}
        made = Cluster(initialize_head=True, head_node_args=head)
        try:
            yield made
        finally:
            made.shutdown()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command, with a corpus in six files, of which the last two hold their reader up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "in").mkdir()
    for number in range(6):
        rows = [
            {"text": f"{'hold' if number > 3 and n == 30 else 'file'} {number} row {n} {'word ' * (n % 17)}"}
            for n in range(40)
        ]
        (tmp_path / "in" / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = f"rows_{secrets.token_hex(4)}"
    (tmp_path / f"{name}.py").write_text(ADAPTER)
    section = {
        "input": "in",
        "output": "out",
        "adapter": f"{name}:read",
        "val_fraction": 0.2,
        "shard_size": 400,
        "tokenizer": {"vocab_size": 300},
    }
    with (tmp_path / "config.yaml").open("w") as file:
        YAML().dump({"prepare": section, "data": {"name": "tokens", "train": "out/train"}}, file)
    return tmp_path


def _let_go(folder: Path, *stages: str) -> None:
    for stage in stages:
        (folder / f"go-{stage}").touch()


def _made_here(folder: Path) -> dict[str, str]:
    """Prepare on threads of this process, and return the hash of each file that was made."""
    _let_go(folder, "read", "encode")
    prepare(load_config(str(folder / "config.yaml")).config)
    expected = _hashes(folder / "out")
    (folder / "out").rename(folder / "expected")
    for stage in ("read", "encode"):
        (folder / f"go-{stage}").unlink()
    return expected


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _command(folder: Path, address: str, faults: str = "") -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "llmtrain", "prepare", "config.yaml", "--engine", "ray", "--address", address]
    environment = {**os.environ, **({VARIABLE: faults} if faults else {})}
    with (folder / "stdout").open("wb") as stdout, (folder / "stderr").open("wb") as stderr:
        return subprocess.Popen([*command, "--json"], cwd=folder, env=environment, stdout=stdout, stderr=stderr)


def _wait(driver: subprocess.Popen[bytes], folder: Path, is_so: Callable[[], bool]) -> None:
    while not is_so():
        assert driver.poll() is None, (folder / "stderr").read_text()
        time.sleep(0.02)


def _held(folder: Path, stage: str) -> list[int]:
    return [int(path.name.rpartition("-")[2]) for path in folder.glob(f"held-{stage}-*")]


def test_a_worker_the_driver_and_a_node_are_killed_and_the_bytes_are_the_same(cluster: Any, folder: Path) -> None:
    expected = _made_here(folder)
    node = cluster.add_node(**SMALL_NODE)
    try:
        driver = _command(folder, cluster.address, faults="kill@shard-noted:2")
        _wait(driver, folder, lambda: len(_held(folder, "read")) == 2)  # one on each node
        os.kill(_held(folder, "read")[0], signal.SIGKILL)
        _let_go(folder, "read", "encode")
        assert driver.wait() == -signal.SIGKILL, (folder / "stderr").read_text()
        assert "Ray lost a task: its process died; attempt 1 of 4" in (folder / "stderr").read_text()
        partial = folder / ".out.partial"
        noted = [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
        done = {entry["shard"]["path"]: 0 for entry in noted if "shard" in entry}
        assert len(done) == 2
        inodes = {path: (partial / path).stat().st_ino for path in done}

        (folder / "go-encode").unlink()
        driver = _command(folder, cluster.address)
        _wait(driver, folder, lambda: len(_held(folder, "encode")) == 2)
    finally:
        cluster.remove_node(node, allow_graceful=False)
    _wait(driver, folder, lambda: any(not Path(f"/proc/{worker}").exists() for worker in _held(folder, "encode")))
    _let_go(folder, "encode")
    told = (folder / "stderr").read_text
    assert driver.wait() == 0, told()
    assert "with 2 shards done" in told()
    assert "Ray lost a task" in told()
    assert _hashes(folder / "out") == expected
    assert {path: (folder / "out" / path).stat().st_ino for path in done} == inodes
    assert json.loads((folder / "stdout").read_text())["errors"] == []
    assert [path.name for path in folder.glob(".*")] == [".out.lock"]


def test_quality_steps_and_inputs_at_addresses_give_the_same_bytes(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.data.prepare import ray_cluster

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = f"own_{secrets.token_hex(4)}"
    (tmp_path / f"{own}.py").write_text("def step(text):\n    assert 'FAIL' not in text\n    return text.strip()\n")
    texts = [f"the of and that have with be to {text}" for text in plant(40, seed=3).texts]
    texts += [*texts[:5], "too short", "", f"{texts[8]} FAIL", *(f" {text}" for text in texts[5:8])]
    rows = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "in").mkdir()
    (tmp_path / "there").mkdir()
    for folder, half in (("in", rows[::2]), ("there", rows[1::2])):
        (tmp_path / folder / "a.jsonl").write_text("".join(half[:20]))
        (tmp_path / folder / "b.jsonl").write_text("".join(half[20:]))
    section: dict[str, Any] = {
        "output": "out",
        "val_fraction": 0.2,
        "shard_size": 4000,
        "on_error": "skip",
        "tokenizer": {"vocab_size": 300},
        "steps": [
            {"name": "exact_duplicates"},
            {"name": "near_duplicates"},
            {"name": "gopher"},
            {"name": "own", "function": f"{own}:step"},
        ],
    }
    with file_server(tmp_path / "there") as address:
        section["input"] = ["in", f"{address}/a.jsonl", f"{address}/b.jsonl"]
        config = Config.model_validate({"prepare": section, "data": {"name": "tokens", "train": "out/train"}})
        here = prepare(config)
        expected = _hashes(tmp_path / "out")
        (tmp_path / "out").rename(tmp_path / "expected")
        with ray_cluster.connected(cluster.address, num_workers=2, local_workers=1) as executor:
            there_made = prepare(config, executor=executor)
    assert _hashes(tmp_path / "out") == expected
    assert "dropped.jsonl" in expected
    assert [bool(step["dropped"]) for step in here["steps"]] == [True, True, True, False]
    assert here["counts"]["errors"] == 1
    assert {**here, "seconds": 0} == {**there_made, "seconds": 0}


def test_ctrl_c_ends_the_tasks_and_faults_end_as_they_do_here(
    cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmtrain.data.prepare import ray_cluster

    config = load_config(str(folder / "config.yaml")).config
    with ray_cluster.connected(cluster.address, num_workers=1, local_workers=1) as executor:
        threading.Thread(target=_interrupt_when_held, args=(folder,)).start()
        with pytest.raises(KeyboardInterrupt):
            prepare(config, executor=executor)
        [worker] = _held(folder, "read")
        while Path(f"/proc/{worker}").exists():
            time.sleep(0.02)

        _let_go(folder, "read", "encode")
        _check_faults(executor, config, folder, monkeypatch)
    assert not (folder / ".out.ray").exists()


def _interrupt_when_held(folder: Path) -> None:
    while not _held(folder, "read"):
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGINT)


def _check_faults(executor: Any, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.data.prepare import ray_cluster

    (folder / "in" / "2.jsonl").write_text('{"text": "fine"}\n{"text": "fi\n')
    with pytest.raises(ConfigError) as here:
        prepare(config)
    assert "2.jsonl:2" in str(here.value)
    with pytest.raises(ConfigError) as there:
        prepare(config, executor=executor)
    assert str(there.value) == str(here.value)
    with pytest.raises(ZeroDivisionError):
        executor.run((1).__truediv__, 0)
    monkeypatch.setattr(ray_cluster, "MAX_ATTEMPTS", 2)
    with pytest.raises(Preempted, match="lost the same task 2 times, the last time because its process died"):
        executor.run(signal.raise_signal, signal.SIGKILL)
    monkeypatch.setattr(ray_cluster, "_versions", lambda: (("llmtrain", "0.0"), ("Python", "3")))
    with pytest.raises(ConfigError, match=r"the Ray node \S+ runs llmtrain .*, and this command 0\.0: install"):
        prepare(config, executor=executor)
