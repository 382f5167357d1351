"""Texts at addresses become the same shards as files of this machine; changed objects are noticed by their etags."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from llmtrain.config.commits import with_commits
from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import read_manifest
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.data.prepare.token_shards import ensure_shards, prepare
from llmtrain.errors import ConfigError
from llmtrain.storage.store import forget_stores, locate
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3

FILES = {
    **{f"{number:02d}.txt": f"document {number}\n\n  of the corpus, é\n".encode() for number in range(12)},
    "sub/rows.jsonl": "".join(json.dumps({"text": f"row {number} of a file"}) + "\n" for number in range(40)).encode(),
    "sub/rows.jsonl.gz": gzip.compress(b"".join(b'{"text": "packed %d"}\n' % number for number in range(20))),
    "notes.md": b"# A title\n",
    "picture.png": b"\x89PNG",
    ".git/config.txt": b"hidden",
}


def config_of(folder: Path, source: str | list[str], **options: Any) -> Config:
    section = {
        "input": source,
        "output": str(folder / "out"),
        "val_fraction": 0.2,
        "tokenizer": {"vocab_size": 300},
        **options,
    }
    data = {"name": "tokens", "train": str(folder / "out/train"), "val": str(folder / "out/val"), "seq_len": 16}
    return Config.model_validate({"data": data, "prepare": section})


def write_local(folder: Path) -> str:
    for name, content in FILES.items():
        (folder / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "texts" / name).write_bytes(content)
    return str(folder / "texts")


def upload(root: str, files: dict[str, bytes]) -> str:
    for name, content in files.items():
        store, key = locate(f"{root}/{name}")
        store.write(key, content)
    return root


def contents(folder: Path) -> list[dict[str, Any]]:
    """Rows of the shards, in order."""
    return [row for path in sorted(folder.rglob("*.parquet")) for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("form", ["", "/", "/**/*.*"])
def test_the_shards_are_those_of_local_files(form: str, s3: LocalS3, tmp_path: Path) -> None:
    local, remote = tmp_path / "local", tmp_path / "remote"
    exclude = ["*.png"]
    prepare(config_of(local, write_local(tmp_path) + form, exclude=exclude))
    root = upload(f"{s3.make_bucket('corpus')}/texts", FILES)
    prepare(config_of(remote, root + form, exclude=exclude))
    assert contents(remote / "out") == contents(local / "out") != []
    (record,) = read_manifest(remote / "out").inputs
    assert (record.name, record.path, record.files) == ("texts", root + form, 15)


def test_shards_are_used_again_until_an_object_changes(
    s3: LocalS3, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = upload(f"{s3.make_bucket('changes')}/texts", FILES)
    config = config_of(tmp_path, root)
    ensure_shards(config)
    made = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    ensure_shards(config)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == made
    upload(root, {"00.txt": b"another text\n"})
    with pytest.raises(ConfigError, match=r"the files of the input .*changes/texts have changed"):
        ensure_shards(config)


def test_shards_are_used_where_the_store_of_their_input_is_out_of_reach(
    s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tmp_path, upload(f"{s3.make_bucket('reach')}/texts", FILES))
    ensure_shards(config)
    made = (tmp_path / "out" / "manifest.json").stat().st_mtime_ns
    monkeypatch.setattr("llmtrain.storage.failures.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    forget_stores()
    ensure_shards(config)
    assert (tmp_path / "out" / "manifest.json").stat().st_mtime_ns == made


def test_a_branch_is_resolved_once_and_recorded(lake: LocalLakeFS, tmp_path: Path) -> None:
    first = lake.commit("repo", "main", {f"texts/{name}": content for name, content in FILES.items()})
    config, commits = with_commits(config_of(tmp_path, ["lakefs://repo/main/texts", "lakefs://repo/main/texts/sub"]))
    assert commits == {"lakefs://repo/main": first}
    assert config.prepare is not None
    assert config.prepare.input == [f"lakefs://repo/{first}/texts", f"lakefs://repo/{first}/texts/sub"]
    assert sum("/commits" in request for request in lake.requests) == 1
    second = lake.commit("repo", "main", {"texts/00.txt": b"moved on\n"})
    prepare(config)
    assert [record.path for record in read_manifest(tmp_path / "out").inputs] == config.prepare.input
    assert len(contents(tmp_path / "out")) == 12 + 40 + 20 + 1
    moved, _ = with_commits(config_of(tmp_path, "lakefs://repo/main/texts"))
    assert moved.prepare is not None
    assert moved.prepare.input == f"lakefs://repo/{second}/texts"
    kept, _ = with_commits(config_of(tmp_path, "lakefs://repo/main/texts"), commits)
    assert kept.prepare is not None
    assert kept.prepare.input == f"lakefs://repo/{first}/texts"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("memory://empty/nothing", "prepare.input: memory://empty/nothing: there is no such object"),
        ("memory://empty/pictures", "no files of text or rows in this folder; it has files of other kinds: .png"),
        ("memory://empty/pictures/*.txt", "there is no such object"),
        ("memory://empty/x.zip", "x.zip: .zip files are not read"),
    ],
)
def test_where_there_is_no_text_is_one_message(source: str, said: str, tmp_path: Path) -> None:
    upload("memory://empty", {"pictures/a.png": b"1", "x.zip": b"2"})
    options = config_of(tmp_path, source).prepare
    assert options is not None
    with pytest.raises(ConfigError, match=said):
        find_inputs(options)


def test_a_branch_that_is_not_there_is_one_message(lake: LocalLakeFS, tmp_path: Path) -> None:
    lake.commit("repo", "main", {"x.txt": b"1"})
    with pytest.raises(ConfigError, match="lakefs://repo/other/: there is no such repository, branch or commit"):
        with_commits(config_of(tmp_path, "lakefs://repo/other/x.txt"))


def test_the_tokenizer_of_an_address_is_fetched(s3: LocalS3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    texts = write_local(tmp_path)
    prepare(config_of(tmp_path / "first", texts))
    folder = tmp_path / "first/out/tokenizer"
    root = upload(f"{s3.make_bucket('tokenizers')}/mine", {path.name: path.read_bytes() for path in folder.iterdir()})
    with_address = {"tokenizer": {"kind": "hf", "path": root}}
    ensure_shards(config_of(tmp_path / "second", texts, **with_address))
    assert contents(tmp_path / "second/out") == contents(tmp_path / "first/out")
    ensure_shards(config_of(tmp_path / "second", texts, **with_address))
