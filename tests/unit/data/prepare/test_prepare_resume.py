"""A preparation that was killed goes on where it was, and gives the same bytes as one that was not."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from llmtrain.config.loading.load import load_config
from llmtrain.data.prepare import token_shards as recipe
from llmtrain.data.prepare.selection import scan
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.faults import VARIABLE

POINTS = [
    "scan-saved",
    "corpus-read",
    "tokenizer-saved",
    "shard-begun",
    "shard-begun:3",
    "shard-written:1",
    "shard-written:4",
    "shard-noted:2",
    "manifest-written",
    "old-moved",
]


def _write_config(folder: Path, **options: Any) -> Path:
    section = {
        "input": str(folder / "in"),
        "output": str(folder / "out"),
        "adapter": "pile",
        "val_fraction": 0.2,
        "shard_size": 400,
        "tokenizer": {"vocab_size": 300},
        "keep_text": True,
        **options,
    }
    keys = {"prepare": section, "data": {"name": "tokens", "train": str(folder / "out/train")}}
    path = folder / "config.yaml"
    with path.open("w") as file:
        YAML().dump(keys, file)
    return path


def _make_corpus(folder: Path) -> None:
    (folder / "in").mkdir()
    for file in range(4):
        rows = [
            {"text": f"file {file} row {n} " + "word " * (n % 17), "meta": {"pile_set_name": "AB"[n % 2]}}
            for n in range(60)
        ]
        (folder / "in" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _prepare(config: Path) -> dict[str, Any]:
    return prepare(load_config(str(config)).config)


def _killed_at(config: Path, point: str) -> None:
    killed = subprocess.run(
        [sys.executable, "-m", "llmtrain", "prepare", str(config)],
        env={**os.environ, VARIABLE: f"kill@{point}"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _inodes(folder: Path) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_ino for path in folder.rglob("*.parquet")}


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_it_goes_on_and_the_bytes_are_the_same(tmp_path: Path, point: str) -> None:
    _make_corpus(tmp_path)
    config = _write_config(tmp_path)
    result = _prepare(config)
    expected = _hashes(tmp_path / "out")
    if point != "old-moved":
        (tmp_path / "out").rename(tmp_path / "expected")
    _killed_at(config, point)
    partial = tmp_path / ".out.partial"
    journal = (
        [json.loads(line) for line in (partial / "journal.jsonl").read_text().splitlines()]
        if (partial / "journal.jsonl").exists()
        else []
    )
    done = [entry["shard"]["path"] for entry in journal if "shard" in entry]
    before = _inodes(partial) if partial.exists() else {}
    again = _prepare(config)
    assert _hashes(tmp_path / "out") == expected
    assert not partial.exists()
    after = _inodes(tmp_path / "out")
    assert {path: after[path] for path in done} == {path: before[path] for path in done}  # they were not made again
    assert {name: again[name] for name in again if name != "seconds"} == {
        name: result[name] for name in result if name != "seconds"
    }


def test_killed_again_and_again_it_ends(tmp_path: Path) -> None:
    _make_corpus(tmp_path)
    config = _write_config(tmp_path)
    _prepare(config)
    expected = _hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "expected")
    for _ in range(3):
        _killed_at(config, "shard-noted:2")
    assert len((tmp_path / ".out.partial/journal.jsonl").read_text().splitlines()) == 2 + 3 * 2
    _prepare(config)
    assert _hashes(tmp_path / "out") == expected


@pytest.mark.parametrize("change", ["options", "input", "torn shard", "torn journal", "lost tokenizer"])
def test_what_was_done_counts_only_where_it_is_still_right(tmp_path: Path, change: str) -> None:
    _make_corpus(tmp_path)
    config = _write_config(tmp_path)
    _killed_at(config, "shard-noted:4")
    partial = tmp_path / ".out.partial"
    (partial / "train" / "shard_99999.parquet").write_bytes(b"stale")
    (partial / "notes").mkdir()
    if change == "options":
        config = _write_config(tmp_path, shard_size=700)
    elif change == "input":
        (tmp_path / "in" / "4.jsonl").write_text('{"text": "new", "meta": {}}\n')
    elif change == "torn shard":
        shard = sorted(partial.rglob("train/A/*.parquet"))[0]
        shard.write_bytes(shard.read_bytes()[:-10])
    elif change == "torn journal":
        journal = partial / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-30])
    else:
        (partial / "tokenizer" / "tokenizer.json").unlink()
    _prepare(config)
    made = _hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "first")
    _prepare(config)
    assert _hashes(tmp_path / "out") == made


def test_a_corpus_is_read_once_and_again_when_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _make_corpus(tmp_path)
    config = _write_config(tmp_path)
    scans: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        scans.append(1)
        return scan(*args, **options)

    monkeypatch.setattr(recipe, "scan", counted)
    _prepare(config)
    expected = _hashes(tmp_path / "out")
    for point in ("scan-saved", "shard-noted:2"):
        _killed_at(config, point)
    assert len(scans) == 1
    _prepare(config)
    assert len(scans) == 1
    assert _hashes(tmp_path / "out") == expected
    _killed_at(config, "scan-saved")
    os.utime(tmp_path / "in" / "2.jsonl", (1, 1))
    _prepare(config)
    assert len(scans) == 2
    assert _hashes(tmp_path / "out") == expected
    _killed_at(config, "scan-saved")
    saved = tmp_path / ".out.partial" / "scan.npz"
    saved.write_bytes(saved.read_bytes()[:-100])
    _prepare(config)
    assert len(scans) == 3
    assert _hashes(tmp_path / "out") == expected
