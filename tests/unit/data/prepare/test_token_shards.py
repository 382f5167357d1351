"""`prepare` from text to shards."""

from __future__ import annotations

import errno
import hashlib
import json
import subprocess
import sys
import sysconfig
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import find_manifest, read_manifest, write_manifest
from llmtrain.data.prepare import documents, shard_plan, shard_writer
from llmtrain.data.prepare.texts import iter_split_texts
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.data.tokenizers import load_tokenizer
from llmtrain.errors import ConfigError, RunError

STDLIB = Path(sysconfig.get_path("stdlib"))


def make_config(folder: Path, **options: Any) -> Config:
    """A small corpus is in folder/in, shards go to folder/out."""
    section = {
        "input": str(folder / "in"),
        "output": str(folder / "out"),
        "val_fraction": 0.3,
        "tokenizer": {"vocab_size": 300},
        **options,
    }
    data = {"name": "tokens", "train": str(folder / "out/train"), "val": str(folder / "out/val"), "seq_len": 16}
    return Config.model_validate({"data": data, "prepare": section})


def make_corpus(folder: Path) -> dict[str, str]:
    """Texts by their source; equal ones once."""
    texts = {f"in:{n:02d}.txt:0": f"document {n}\r\n\n  with <|endoftext|> and\té\n" for n in range(15)}
    rows = [f"row {n} of the corpus" for n in range(15)]
    (folder / "in").mkdir()
    for source, text in texts.items():
        (folder / "in" / source.split(":")[1]).write_bytes(text.encode())
    lines = [json.dumps({"text": text}) for text in rows]
    (folder / "in" / "sub").mkdir()
    (folder / "in" / "sub" / "rows.jsonl").write_text("\n\n".join(lines) + "\n" + lines[0])
    (folder / "in" / "same.md").write_bytes(texts["in:03.txt:0"].encode())
    (folder / "in" / "empty.md").write_bytes(b"")
    return texts | {f"in:sub/rows.jsonl:{2 * n}": text for n, text in enumerate(rows)}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in the folder."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_every_document_arrives_once_unchanged_and_with_its_end_token(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path)
    result = prepare(make_config(tmp_path, keep_text=True))
    out = tmp_path / "out"
    manifest = read_manifest(out)
    tokenizer = load_tokenizer(out / "tokenizer")
    assert manifest.counts.model_dump() == {
        "read": 33, "train": 30 - manifest.counts.val, "val": manifest.counts.val,
        "dropped": 2, "empty": 1, "errors": 0,
    }  # fmt: skip
    assert 0 < manifest.counts.val < 30
    found: dict[str, str] = {}
    for split in ("train", "val"):
        rows = pq.read_table(out / split).to_pylist()
        texts = list(iter_split_texts(out, split))
        assert texts == [row["text"] for row in rows]
        for row in rows:
            assert row["length"] == len(row["tokens"])
            assert row["tokens"][-1] == tokenizer.eos_id
            assert tokenizer.eos_id not in row["tokens"][:-1]
            assert row["tokens"][:-1] == tokenizer.encode(row["text"])
            held_out = hashlib.sha256(row["text"].encode()).digest() < int(0.3 * 2**64).to_bytes(8, "big")
            assert held_out == (split == "val")
            found[row["source"]] = row["text"]
        record = manifest.splits[split]
        assert record.tokens == sum(row["length"] for row in rows) == result[f"{split}_tokens"]
        assert record.bytes == sum(len(text.encode()) for text in texts)
        assert record.documents == len(rows) == result[f"{split}_documents"]
    assert found == corpus
    assert manifest.token_dtype == "uint16"
    assert (result["documents"], result["rejected"], result["vocab_size"]) == (33, 3, 300)
    json.dumps(result)


def test_files_do_not_depend_on_the_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path)
    monkeypatch.setattr(shard_plan, "ROW_GROUP_TOKENS", 40)
    made = []
    for num_workers, block in ((1, 1 << 22), (2, 1 << 22), (5, 50)):
        monkeypatch.setattr(documents, "BLOCK_BYTES", block)
        prepare(make_config(tmp_path, num_workers=num_workers, shard_size=60))
        made.append(hashes(tmp_path / "out"))
    assert made[0] == made[1]
    made[2]["manifest.json"] = made[0]["manifest.json"]  # its hash of the inputs is over blocks
    assert made[2] == made[0]
    assert len([name for name in made[0] if name.startswith("train/")]) > 2


def test_shards_of_an_earlier_run_do_not_survive(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    prepare(make_config(tmp_path, shard_size=20))
    before = hashes(tmp_path / "out")
    prepare(make_config(tmp_path, val_fraction=0))
    after = hashes(tmp_path / "out")
    assert len(before) > 20
    assert [name for name in after if not name.startswith("tokenizer/")] == [
        "dropped.jsonl",
        "manifest.json",
        "train/shard_00000.parquet",
    ]
    assert list(read_manifest(tmp_path / "out").splits) == ["train"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "in", "out"]


def test_foreign_files_are_never_replaced(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    out = tmp_path / "out"
    (out / "train").mkdir(parents=True)
    (out / "train" / "shard_00000.parquet").write_bytes(b"another tool's, without a manifest")
    with pytest.raises(ConfigError, match=r"prepare did not make \(train/shard_00000\.parquet\)"):
        prepare(make_config(tmp_path))
    (out / "train" / "shard_00000.parquet").unlink()
    prepare(make_config(tmp_path))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"prepare did not make \(notes\.txt\)"):
        prepare(make_config(tmp_path))
    assert (out / "notes.txt").read_text() == "mine"
    assert find_manifest(out / "train") == out


def test_a_failed_prepare_leaves_the_old_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_corpus(tmp_path)
    config = make_config(tmp_path)
    prepare(config)
    before = hashes(tmp_path / "out")
    (tmp_path / "in" / "zz.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ConfigError, match=r"zz\.txt:1: is not UTF-8"):
        prepare(config)
    (tmp_path / "in" / "zz.txt").unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "shard_00000.parquet")

    monkeypatch.setattr(shard_writer.ShardWriter, "__call__", full)
    with pytest.raises(RunError, match=r"cannot be written \(shard_00000\.parquet: No space left on device\)"):
        prepare(config)
    assert hashes(tmp_path / "out") == before
    monkeypatch.undo()
    prepare(config)
    assert hashes(tmp_path / "out") == before
    assert not (tmp_path / ".out.partial").exists()


def test_a_change_of_the_input_in_the_middle_is_noticed(tmp_path: Path) -> None:
    make_corpus(tmp_path)

    def change(stage: str, done: int, total: int, *, speed: str | None = None) -> None:
        if (stage, done) == ("tokenizer", 0):
            (tmp_path / "in" / "05.txt").write_text("something else")

    with pytest.raises(RunError, match="changed while it was read"):
        prepare(make_config(tmp_path), progress=change)
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_token_shards import make_config
from llmtrain.data.prepare.token_shards import prepare

def die(stage, done, total, speed=None):
    if stage == {stage!r}:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(make_config(Path({folder!r}), keep_text=True), progress=die)
"""


@pytest.mark.parametrize("stage", ["read", "encode"])
def test_a_killed_prepare_leaves_the_old_shards_and_is_cleared_away(tmp_path: Path, stage: str) -> None:
    make_corpus(tmp_path)
    prepare(make_config(tmp_path))
    before = hashes(tmp_path / "out")
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), stage=stage)
    killed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert hashes(tmp_path / "out") == before
    assert (tmp_path / ".out.partial").is_dir()
    (tmp_path / ".out.partial" / "stale").write_text("left over")
    prepare(make_config(tmp_path))
    assert hashes(tmp_path / "out") == before
    assert not (tmp_path / ".out.partial").exists()


def test_killed_between_the_two_renames_the_old_shards_come_back(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    prepare(make_config(tmp_path))
    before = hashes(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / ".out.old")
    (tmp_path / "in" / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        prepare(make_config(tmp_path))
    assert hashes(tmp_path / "out") == before


def test_an_existing_tokenizer_is_copied_beside_the_shards(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    prepare(make_config(tmp_path))
    first = read_manifest(tmp_path / "out").tokenizer
    made = make_config(
        tmp_path, output=str(tmp_path / "two"), tokenizer={"kind": "hf", "path": str(tmp_path / "out/tokenizer")}
    )
    prepare(made)
    second = read_manifest(tmp_path / "two").tokenizer
    assert (second.kind, second.vocab_size, second.eos_id) == ("hf", first.vocab_size, first.eos_id)
    for split in ("train", "val"):
        one, two = (pq.read_table(tmp_path / out / split, columns=["tokens"]) for out in ("out", "two"))
        assert one == two


def test_stages_are_reported_and_their_speed_logged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_corpus(tmp_path)
    calls: list[tuple[str, int, int]] = []
    speeds: list[str | None] = []

    def report(stage: str, done: int, total: int, *, speed: str | None = None) -> None:
        calls.append((stage, done, total))
        speeds.append(speed)

    monkeypatch.setattr("llmtrain.data.prepare.progress._SECONDS_BETWEEN_CALLS", 0.0)
    prepare(make_config(tmp_path), progress=report)
    assert any("tokens/s" in speed for speed in speeds if speed)
    for stage in ("read", "tokenizer", "encode"):
        mine = [(done, total) for name, done, total in calls if name == stage]
        assert mine[0][0] == 0
        assert mine[-1][0] == mine[-1][1] > 0
        assert mine == sorted(mine)
    log = capsys.readouterr().err
    for words in ("read: 33 read", "2 dropped", "tokenizer: trained on", "MB/s", "tokens/s"):
        assert words in log


@pytest.mark.parametrize("output", ["file.txt/out", "file.txt"])
def test_an_unusable_output_is_a_clear_error(tmp_path: Path, output: str) -> None:
    make_corpus(tmp_path)
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ConfigError, match=r"prepare\.output"):
        prepare(make_config(tmp_path, output=str(tmp_path / output)))


def test_no_prepare_section_is_a_clear_error(tmp_path: Path) -> None:
    config = make_config(tmp_path).model_copy(update={"prepare": None})
    with pytest.raises(ConfigError, match="no `prepare` section"):
        prepare(config)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=200), min_size=1, max_size=20, unique=True))
def test_any_texts_come_out_of_the_shards_again(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "in").mkdir()
    (folder / "in" / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in ["x", *texts]))
    prepare(make_config(folder, val_fraction=0, steps=[], tokenizer={"vocab_size": 260}))
    assert list(iter_split_texts(folder / "out", "train")) == [text for text in ["x", *texts] if text.strip()]


def test_a_slice_of_the_standard_library(tmp_path: Path) -> None:
    config = make_config(
        tmp_path, input=[str(STDLIB / "json"), str(STDLIB / "email"), f"{STDLIB}/te*.py"], include=["*.py"],
        tokenizer={"vocab_size": 2048}, val_fraction=0.1,
    )  # fmt: skip
    prepare(config)
    out = tmp_path / "out"
    files = [*(STDLIB / "json").rglob("*.py"), *(STDLIB / "email").rglob("*.py"), *STDLIB.glob("te*.py")]
    texts = {path.read_bytes().decode() for path in files if path.stat().st_size}
    assert {text for split in ("train", "val") for text in iter_split_texts(out, split)} == texts
    manifest = read_manifest(out)
    assert manifest.splits["train"].bytes / manifest.splits["train"].tokens > 3.5
    assert [source.name for source in manifest.inputs] == ["json", "email", STDLIB.name]
    tokens = pq.read_table(out / "train", columns=["tokens"]).column("tokens").combine_chunks().values
    assert np.asarray(tokens).max() < manifest.tokenizer.vocab_size <= 2048


def test_a_broken_manifest_is_a_clear_error(tmp_path: Path) -> None:
    make_corpus(tmp_path)
    prepare(make_config(tmp_path))
    path = tmp_path / "out" / "manifest.json"
    whole = path.read_text()
    good = read_manifest(tmp_path / "out")
    for content, message in (
        (whole[: len(whole) // 2], "is no JSON"),
        ("[]", "Input should be"),
        (whole.replace('"format_version": 2', '"format_version": 3'), "format_version is 3.*update llmtrain"),
        (whole.replace('"eos_id": 0', '"eos_id": null'), r"tokenizer\.eos_id"),
    ):
        path.write_text(content)
        with pytest.raises(ConfigError, match=textwrap.shorten(message, 80)):
            read_manifest(tmp_path / "out")
    path.unlink()
    with pytest.raises(ConfigError, match="no complete token shards"):
        read_manifest(tmp_path / "out")
    write_manifest(tmp_path / "out", good)
    assert path.read_text() == whole
