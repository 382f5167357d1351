"""Runs on token shards in an object store: the weights of a run on the same shards here, also after a stop."""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest

from llmtrain.cli.app import run as run_command
from llmtrain.config.loading.load import load_config
from llmtrain.errors import Preempted
from llmtrain.storage.store import forget_stores, locate
from llmtrain.verbs.prepare import prepare
from llmtrain.verbs.train import train
from tests.support.moto_s3 import LocalS3
from tests.support.tiny_run import tiny_config, weight_hash, write_config
from tests.support.token_shards import copy_to_store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[LocalS3]:
    with LocalS3() as one:
        yield one


@pytest.fixture(autouse=True)
def s3(server: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "copies"))
    forget_stores()
    yield server.make_bucket("bucket")
    forget_stores()


@pytest.fixture
def configs(s3: str, tmp_path: Path) -> tuple[str, str]:
    """The config of a run on shards here, and of one on the same shards in the store."""
    keys = tiny_config(tmp_path / "shards", tmp_path / "runs")
    here = str(write_config(tmp_path / "here.yaml", keys))
    prepare(load_config(here))
    copy_to_store(tmp_path / "shards", f"{s3}/prepared")
    del keys["prepare"]
    places = {"train": f"{s3}/prepared/train", "val": f"{s3}/prepared/val", "cache_dir": str(tmp_path / "cache")}
    keys["data"] = {**keys["data"], **places}
    return here, str(write_config(tmp_path / "there.yaml", keys))


def test_a_run_on_shards_in_a_store_has_the_weights_of_one_on_the_same_shards_here(
    configs: tuple[str, str], s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = configs
    expected = weight_hash(Path(train(load_config(here))["run"]))
    with_workers = train(load_config(there, ["data.num_workers=2", "output.run_id=workers"]))
    assert weight_hash(Path(with_workers["run"])) == expected

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=17")
    with pytest.raises(Preempted):
        train(load_config(there, ["output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    resumed = train(None, resume=str(tmp_path / "runs/stopped"))
    assert weight_hash(Path(resumed["run"])) == expected

    lineage = json.loads((Path(with_workers["run"]) / "lineage.json").read_text())
    [training] = [one for one in lineage["ingredients"] if one["kind"] == "training data"]
    manifest = (tmp_path / "shards/manifest.json").read_bytes()
    assert training["name"] == f"{s3}/prepared/train"
    assert training["files"]["manifest.json"] == sha256(manifest).hexdigest()
    assert training["files"]["train/shard_00000.parquet"]


def test_inspect_reads_shards_in_a_store(configs: tuple[str, str], s3: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["inspect", configs[1], "--json"]) == 0
    there = json.loads(capsys.readouterr().out)
    assert run_command(["inspect", configs[0], "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    for key in ("documents", "tokens", "lengths", "items"):
        assert there[key] == here[key]


def test_a_shard_that_is_replaced_is_one_message(
    configs: tuple[str, str], s3: str, capfd: pytest.CaptureFixture[str]
) -> None:
    store, key = locate(f"{s3}/prepared/train/shard_00000.parquet")
    content = bytearray(store.read(key))
    content[1000:2000] = bytes(1000)
    store.write(key, bytes(content))
    assert run_command(["train", configs[1]]) == 2
    error = capfd.readouterr().err
    assert f"{s3}/prepared/train/shard_00000.parquet: row group 0 cannot be read" in error
    assert "it is not the shard that its manifest.json describes" in error
    assert "Traceback" not in error
