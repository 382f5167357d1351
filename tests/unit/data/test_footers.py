"""Shards without a manifest, as other tools and older versions wrote them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain import atomic
from llmtrain.config.sections.data import TokensConfig
from llmtrain.data import footers
from llmtrain.data.footers import INDEX_NAME
from llmtrain.data.shards import ShardWindows
from llmtrain.data.sources import open_given_tokenizer, open_source
from llmtrain.data.tokenizers import train_bpe
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.errors import ConfigError

DOCUMENTS = [[(7 * n + k) % 256 + 1 for k in range(n % 23)] + [0] for n in range(200)]
INT32 = pa.list_(pa.int32())
FORMS: dict[str, dict[str, Any]] = {
    "as the older preprocess": {"type": INT32, "text": True},
    "tokens alone": {"type": pa.list_(pa.uint16()), "source": False},
    "input_ids": {"type": pa.list_(pa.int64()), "source": False, "name": "input_ids"},
    "large lists": {"type": pa.large_list(pa.int32()), "source": False},
    "without statistics": {"type": INT32, "write_statistics": False},
    "with empty and null rows": {"type": INT32, "source": False, "holes": True},
}


def _write(
    folder: Path,
    *,
    type: Any,
    name: str = "tokens",
    source: bool = True,
    text: bool = False,
    holes: bool = False,
    **options: Any,
) -> list[int]:
    """Three shards of four row groups; returns their tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    documents: list[list[int] | None] = list(DOCUMENTS)
    if holes:
        documents[3:3] = [[], None]
    for number, start in enumerate(range(0, len(documents), 70)):
        part = documents[start : start + 70]
        columns = {name: pa.array(part, type)}
        if source:
            columns = {
                "source": pa.array([f"wikipedia/train/en:{n}" for n in range(len(part))]),
                "length": pa.array([len(document or ()) for document in part], pa.int32()),
                **({"text": pa.array(["text"] * len(part))} if text else {}),
                **columns,
            }
        pq.write_table(pa.table(columns), folder / f"shard_{number:05d}.parquet", row_group_size=20, **options)
    return [token for document in documents if document for token in document]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    train_bpe(["some text"], vocab_size=257).save(tmp_path / "tokenizer")
    return str(tmp_path / "tokenizer")


def _stream(folder: Path, tokenizer: str, cache: Path) -> Any:
    return open_source(str(folder), key="data.train", given=open_given_tokenizer(tokenizer, cache_dir=str(cache)))


@pytest.mark.parametrize("form", FORMS)
def test_shards_of_every_form_are_one_stream(tmp_path: Path, tokenizer: str, form: str) -> None:
    tokens = _write(tmp_path / "old/train", **FORMS[form])
    for _ in range(2):  # from the footers, and from the index
        source = _stream(tmp_path / "old/train", tokenizer, tmp_path / "cache")
        assert source.stream.num_tokens == len(tokens)
        assert source.num_bytes is None
        windows = ShardWindows(source.stream, len(tokens) - 1)
        out = np.zeros((1, len(tokens)), np.int64)
        windows.open(None).read(np.array([0]), out)
        assert out[0].tolist() == tokens
        assert (tmp_path / "old/train" / INDEX_NAME).is_file()


def test_footers_are_read_once_and_again_when_a_shard_changes(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "old"
    _write(folder, type=INT32)
    read: list[str] = []
    footer = footers._read_footer

    def counted(file: Path, *, key: str) -> Any:
        read.append(file.name)
        return footer(file, key=key)

    monkeypatch.setattr(footers, "_read_footer", counted)
    names = [f"shard_{number:05d}.parquet" for number in range(3)]
    first = _stream(folder, tokenizer, tmp_path / "cache")
    assert sorted(read) == names
    assert _stream(folder, tokenizer, tmp_path / "cache").content_sha256 == first.content_sha256
    assert sorted(read) == names
    pq.write_table(pa.table({"tokens": [[5, 6, 0]]}), folder / names[1])
    changed = _stream(folder, tokenizer, tmp_path / "cache")
    assert sorted(read) == [names[0], names[1], names[1], names[2]]
    assert changed.content_sha256 != first.content_sha256
    (folder / INDEX_NAME).write_text('{"version": 1, "shards": {"shard_00000.parquet": {"nonsense": 1}}}')
    assert _stream(folder, tokenizer, tmp_path / "cache").content_sha256 == changed.content_sha256


def test_the_index_goes_where_it_can_be_written(
    tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "old"
    tokens = _write(folder, type=INT32)
    write_text = atomic.write_text

    def refused(path: Path, text: str) -> None:
        if folder in path.parents or not cache_is_writable:
            raise PermissionError(13, "Permission denied", str(path))
        write_text(path, text)

    monkeypatch.setattr("llmtrain.data.footers.write_text", refused)
    cache_is_writable = False
    assert _stream(folder, tokenizer, tmp_path / "cache").stream.num_tokens == len(tokens)
    cache_is_writable = True
    assert _stream(folder, tokenizer, tmp_path / "cache").stream.num_tokens == len(tokens)
    [index] = (tmp_path / "cache/indexes").glob("*.json")
    assert set(json.loads(index.read_text())["shards"]) == {f"shard_{number:05d}.parquet" for number in range(3)}
    assert sorted(os.listdir(folder)) == [f"shard_{number:05d}.parquet" for number in range(3)]
    monkeypatch.setattr(footers, "_read_footer", None)
    assert _stream(folder, tokenizer, tmp_path / "cache").stream.num_tokens == len(tokens)


def test_they_train_with_the_tokenizer_that_the_config_names(tmp_path: Path, tokenizer: str) -> None:
    tokens = _write(tmp_path / "old/train/en", type=INT32)
    _write(tmp_path / "old/val/en", type=INT32)
    config = TokensConfig(
        train=str(tmp_path / "old/train"),
        val=str(tmp_path / "old/val"),
        tokenizer=tokenizer,
        cache_dir=str(tmp_path / "cache"),
        seq_len=16,
    )
    data = open_training_data(config, seed=1)
    assert (data.facts.vocab_size, data.facts.eos_id, data.facts.num_tokens) == (257, 0, len(tokens))
    assert data.facts.tokenizer == Path(tokenizer)
    assert data.facts.tokens_per_byte is None
    validation = open_validation_data(config, seed=1, training=data)
    assert validation is not None
    first = next(data.batches(start_item=0, batch_size=4, end_item=4, micro_batch_size=4))
    assert first[0]["input_ids"].shape == (4, 16)


def test_what_is_no_token_shard_is_a_clear_error(tmp_path: Path, tokenizer: str) -> None:
    cache = tmp_path / "cache"
    _write(tmp_path / "a/train", type=INT32)
    with pytest.raises(ConfigError, match=r"belongs to no manifest\.json.* or name the tokenizer .* data\.tokenizer"):
        open_source(str(tmp_path / "a/train"), key="data.train")
    _write(tmp_path / "a/val", type=INT32)
    with pytest.raises(ConfigError, match="holds the splits train and val, which must not be mixed"):
        _stream(tmp_path / "a", tokenizer, cache)
    (tmp_path / "b").mkdir()
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "b/x.parquet")
    with pytest.raises(ConfigError, match="has no column tokens or input_ids, only text: it is no token shard"):
        _stream(tmp_path / "b", tokenizer, cache)
    pq.write_table(pa.table({"tokens": ["a"]}), tmp_path / "b/x.parquet")
    with pytest.raises(ConfigError, match="the column tokens is string, not a list of integers"):
        _stream(tmp_path / "b", tokenizer, cache)
    pq.write_table(pa.table({"tokens": [[1, 257]]}), tmp_path / "b/x.parquet")
    with pytest.raises(ConfigError, match=r"holds the token 257, but data\.tokenizer has 257 tokens"):
        _stream(tmp_path / "b", tokenizer, cache)
    (tmp_path / "b/x.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"x\.parquet: cannot be read as Parquet"):
        _stream(tmp_path / "b", tokenizer, cache)
