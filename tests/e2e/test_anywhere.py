"""Runs on data in stores: the same weights as from files here, at one commit of a branch that moves, with a lineage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run as run_command
from llmtrain.config.loading.load import load_config
from llmtrain.errors import ConfigError, Preempted
from llmtrain.storage.store import locate
from llmtrain.verbs.lineage import lineage
from llmtrain.verbs.prepare import prepare
from llmtrain.verbs.train import train
from tests.support.lakefs import SECRET_KEY, LocalLakeFS
from tests.support.moto_s3 import LocalS3
from tests.support.tiny_huggingface import write_tiny_chat_folder
from tests.support.tiny_run import tiny_config, tiny_tuning, weight_hash, write_config
from tests.support.worker_groups import GroupServer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "copies"))


def rows(first: int = 0) -> bytes:
    lines = [{"prompt": f"question {number}", "completion": f"answer {number}"} for number in range(first, first + 60)]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def files_of(folder: Path, below: str) -> dict[str, bytes]:
    return {f"{below}/{path.name}": path.read_bytes() for path in folder.iterdir() if path.is_file()}


def config_of(folder: Path, model: str, train_rows: str) -> str:
    tuned: dict[str, Any] = {"name": "huggingface", "path": model}
    every = {"log_every_steps": 1, "eval_every_steps": 4, "save_every_steps": 2}
    keys = tiny_tuning(folder, Path("unused"), tuned, seq_len=96, max_steps=8, **every)
    keys["data"]["train"] = train_rows
    return str(write_config(folder / "tuned.yaml", keys))


@pytest.fixture
def local_weights(base: Path, tmp_path: Path) -> str:
    """Weights of the run on the same rows and model in files of this machine."""
    folder = tmp_path / "local"
    folder.mkdir()
    (folder / "rows.jsonl").write_bytes(rows())
    summary = train(load_config(config_of(folder, str(base), str(folder / "rows.jsonl"))))
    return weight_hash(Path(summary["run"]))


def stop_at_step(step: int, config: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_FAULTS", f"term@stepped:step={step}")
    with pytest.raises(Preempted):
        train(load_config(config, ["output.run_id=stopped"]))
    monkeypatch.delenv("LLMTRAIN_FAULTS")


@pytest.mark.parametrize("with_config", [False, True])
def test_a_run_keeps_its_commit_while_the_branch_moves(
    base: Path,
    lake: LocalLakeFS,
    local_weights: str,
    tmp_path: Path,
    with_config: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = files_of(base, "base")
    first = lake.commit("repo", "main", {"rows.jsonl": rows(), **model})
    config = config_of(tmp_path, "lakefs://repo/main/base", "lakefs://repo/main/rows.jsonl")
    stop_at_step(3, config, monkeypatch)
    lake.commit("repo", "main", {"rows.jsonl": rows(first=500), **model})
    run = tmp_path / "runs" / "stopped"
    train(load_config(config) if with_config else None, resume=str(run))
    assert weight_hash(run) == local_weights
    assert f"lakefs://repo/{first}/rows.jsonl" in (run / "config.yaml").read_text()
    assert "repo/main" not in (run / "config.yaml").read_text()
    assert json.loads((run / "meta.json").read_text())["commits"] == {"lakefs://repo/main": first}
    ingredients = {one["kind"]: one for one in json.loads((run / "lineage.json").read_text())["ingredients"]}
    assert [ingredients[kind]["revision"] for kind in ("base model", "tokenizer", "training data")] == [first] * 3
    for file in run.rglob("*"):
        if file.is_file():
            assert SECRET_KEY.encode() not in file.read_bytes()
    fresh = train(load_config(config, ["output.run_id=fresh", "trainer.max_steps=1"]))
    assert "lakefs://repo/main" in json.loads((Path(fresh["run"]) / "meta.json").read_text())["commits"]
    assert first not in (Path(fresh["run"]) / "config.yaml").read_text(), "a new run takes the branch as it is now"


def test_all_ranks_read_one_commit(base: Path, lake: LocalLakeFS, tmp_path: Path, groups: GroupServer) -> None:
    commit = lake.commit("repo", "main", {"rows.jsonl": rows()})
    config = config_of(tmp_path, str(base), "lakefs://repo/main/rows.jsonl")
    group = groups.start(["train", config, "output.run_id=two"], world_size=2, environment=lake.environment)
    assert group.wait() == [0, 0], group.stderr
    assert sum(request.endswith("/refs/main/commits") for request in lake.requests) == 1
    assert not [request for request in lake.requests if "/refs/main/objects" in request]
    assert json.loads((tmp_path / "runs/two/meta.json").read_text())["commits"] == {"lakefs://repo/main": commit}


def test_rows_and_a_model_in_s3_give_the_same_weights_and_a_lineage_that_can_be_checked(
    base: Path, s3: LocalS3, local_weights: str, tmp_path: Path
) -> None:
    bucket = s3.make_bucket("anywhere")
    store, _ = locate(f"{bucket}/")
    for name, content in {"rows.jsonl": rows(), **files_of(base, "base")}.items():
        store.write(name, content)
    config = config_of(tmp_path, f"{bucket}/base", f"{bucket}/rows.jsonl")
    prepared = prepare(load_config(config))
    assert prepared["rows"] == 60
    run = Path(train(load_config(config))["run"])
    assert weight_hash(run) == local_weights
    ingredients = {one["kind"]: one for one in json.loads((run / "lineage.json").read_text())["ingredients"]}
    assert ingredients["training data"]["folder"] == f"{bucket}/"
    assert ingredients["training data"]["facts"] == {"etag": store.stat("rows.jsonl").etag, "bytes": len(rows())}
    assert lineage(str(run), check=True)["unchanged"] is True
    store.write("rows.jsonl", rows(first=1))
    checked = lineage(str(run), check=True)
    assert checked["unchanged"] is False
    assert any("s3://anywhere/rows.jsonl: its content has changed" in problem for problem in checked["problems"])


def test_texts_in_s3_become_a_model(s3: LocalS3, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = s3.make_bucket("texts")
    store, _ = locate(f"{bucket}/")
    text = "".join(f"line {number} of a small text, with some words in it\n" for number in range(40))
    (tmp_path / "texts").mkdir()
    for number in range(40):
        content = f"{number}\n{text}".encode()
        store.write(f"texts/{number}.txt", content)
        (tmp_path / "texts" / f"{number}.txt").write_bytes(content)
    hashes = []
    for name, source in (("here", str(tmp_path / "texts")), ("there", f"{bucket}/texts")):
        keys = tiny_config(tmp_path / name / "shards", tmp_path / name / "runs")
        keys["prepare"] |= {"input": source, "tokenizer": {"kind": "bpe", "vocab_size": 300}}
        keys["trainer"]["max_steps"] = 3
        (tmp_path / name).mkdir()
        config = str(write_config(tmp_path / name / "tiny.yaml", keys))
        assert run_command(["prepare", config]) == 0
        hashes.append(weight_hash(Path(train(load_config(config))["run"])))
    assert hashes[0] == hashes[1]
    assert run_command(["inspect", f"{bucket}/nothing.jsonl"]) == 2
    assert "s3://texts/nothing.jsonl: there is no such object" in capsys.readouterr().err


def test_a_branch_that_is_not_there_writes_nothing(base: Path, lake: LocalLakeFS, tmp_path: Path) -> None:
    lake.commit("repo", "main", {"rows.jsonl": rows()})
    with pytest.raises(ConfigError, match="lakefs://repo/typo/: there is no such repository, branch or commit"):
        train(load_config(config_of(tmp_path, str(base), "lakefs://repo/typo/rows.jsonl")))
    assert not (tmp_path / "runs").exists()
