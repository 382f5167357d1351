"""`data.name: corpus` and `huggingface`: shards are made in a cache, by the same preparation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest

from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.schema import Config
from llmtrain.data.manifest import read_manifest
from llmtrain.data.prepare import token_shards as recipe
from llmtrain.data.prepare.texts import iter_split_texts
from llmtrain.data.prepare.token_shards import ensure_shards
from llmtrain.data.tokens import open_training_data, open_validation_data
from llmtrain.errors import ConfigError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders that were prepared."""
    folders: list[str] = []
    make = recipe._make

    def counted(options: Any, output: Path, **rest: Any) -> Any:
        folders.append(output.name)
        return make(options, output, **rest)

    monkeypatch.setattr(recipe, "_make", counted)
    return folders


def _texts(folder: Path, name: str, count: int = 40) -> Path:
    (folder / name).mkdir(parents=True)
    for n in range(count):
        (folder / name / f"{n:02d}.txt").write_text(f"{name} document {n}, " * 5)
    return folder / name


def _config(folder: Path, **data: Any) -> Config:
    section = {"seq_len": 16, "cache_dir": str(folder / "cache"), "tokenizer": {"vocab_size": 300}, **data}
    return Config.model_validate({"data": section})


def _ready(config: Config) -> TokensConfig:
    ready = ensure_shards(config)
    assert isinstance(ready, TokensConfig)
    return ready


def _split(ready: TokensConfig, split: str) -> list[str]:
    path = Path(str(ready.train if split == "train" else ready.val))
    return sorted(iter_split_texts(path.parent, path.name))


def test_a_corpus_is_prepared_once_and_again_when_it_changes(tmp_path: Path, made: list[str]) -> None:
    source = _texts(tmp_path, "corpus")
    config = _config(tmp_path, name="corpus", train=str(source), val_fraction=0.2)
    first = _ready(config)
    assert _ready(config) == first
    assert len(made) == 1
    assert sorted(_split(first, "train") + _split(first, "val")) == sorted(p.read_text() for p in source.iterdir())
    assert (first.seq_len, first.mask_documents) == (16, True)
    data = open_training_data(first, seed=1)
    assert open_validation_data(first, seed=1, training=data) is not None
    (source / "00.txt").write_text("another text")
    second = _ready(config)
    assert len(made) == 2
    assert second.train != first.train
    assert "another text" in _split(second, "train") + _split(second, "val")
    assert Path(str(first.train)).is_dir()  # a run that reads the old ones is not disturbed
    _ready(_config(tmp_path, name="corpus", train=str(source), val_fraction=0.3))
    _ready(_config(tmp_path, name="corpus", train=str(source), val_fraction=0.2, tokenizer={"kind": "char"}))
    assert len(set(made)) == 4
    assert _ready(config) == second
    assert len(made) == 4


def test_it_may_lie_anywhere(tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _texts(tmp_path / "one", "corpus")
    ready = _ready(_config(tmp_path, name="corpus", train=str(tmp_path / "one/corpus"), val_fraction=0.2))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.chdir(tmp_path / "two")
    assert _ready(_config(tmp_path, name="corpus", train="corpus", val_fraction=0.2)) == ready
    assert len(made) == 1


def test_a_cache_inside_of_the_corpus_is_not_read(tmp_path: Path, made: list[str]) -> None:
    _texts(tmp_path, "corpus")
    config = _config(tmp_path, name="corpus", train=str(tmp_path), val_fraction=0)
    ready = _ready(config)
    assert ready.val is None
    assert _ready(config) == ready
    assert len(made) == 1


def test_a_validation_text_gets_the_tokenizer_of_the_training_text(tmp_path: Path, made: list[str]) -> None:
    train, val = _texts(tmp_path, "corpus"), _texts(tmp_path, "other", 5)
    ready = _ready(_config(tmp_path, name="corpus", train=[str(train)], val=f"{val}/*.txt"))
    assert len(_split(ready, "train")) == 40
    assert sorted(iter_split_texts(Path(str(ready.val)).parent, "train")) == sorted(
        p.read_text() for p in val.iterdir()
    )
    data = open_training_data(ready, seed=1)
    validation = open_validation_data(ready, seed=1, training=data)
    assert validation is not None
    assert validation.facts.tokenizer_sha256 == data.facts.tokenizer_sha256
    _ready(_config(tmp_path, name="corpus", train=[str(train)], val=f"{val}/*.txt"))
    assert len(made) == 2


def test_a_dataset_is_prepared_with_its_splits(tmp_path: Path, made: list[str]) -> None:
    splits = {name: [{"text": f"{name} {n}", "url": f"u{n}"} for n in range(50)] for name in ("train", "test")}
    saved = datasets.DatasetDict({name: datasets.Dataset.from_list(rows) for name, rows in splits.items()})
    saved.save_to_disk(str(tmp_path / "saved"))
    data = {"name": "huggingface", "path": str(tmp_path / "saved"), "train": "train[:50%]", "adapter": "c4"}
    ready = _ready(_config(tmp_path, **data, val="test"))
    assert _split(ready, "train") == sorted(f"train {n}" for n in range(25))
    assert sorted(iter_split_texts(Path(str(ready.val)).parent, "train")) == sorted(f"test {n}" for n in range(50))
    held_out = _ready(_config(tmp_path, **data, val_fraction=0.4))
    assert sorted(_split(held_out, "train") + _split(held_out, "val")) == _split(ready, "train")
    assert len(made) == 3
    [record] = read_manifest(Path(str(ready.train)).parent).inputs
    assert record.path == f"{tmp_path}/saved train[:50%]"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"train": "nowhere"}, r"data\.train: nowhere: no such file or folder"),
        ({"train": "corpus", "val_fraction": 0.000001}, r"data\.val_fraction: 1e-06 of 40 documents held out none"),
        (
            {"train": "corpus", "val_fraction": 0.2, "tokenizer": {"kind": "hf", "path": "./none"}},
            r"tokenizer './none': no such folder",
        ),
        ({"train": "bad"}, r"a\.jsonl:1: is no JSON .*data\.on_error: skip"),
        ({"train": "picture"}, r"name the wanted ones in prepare\.include \(that key goes with a `prepare` section"),
        ({"name": "huggingface", "path": "nowhere"}, r"data\.path: nowhere: no such folder .*hf://nowhere"),
    ],
)
def test_mistakes_are_told_in_the_keys_of_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict[str, Any], message: str
) -> None:
    _texts(tmp_path, "corpus")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.jsonl").write_text('{"text": \n{"text": "b"}\n')
    (tmp_path / "picture").mkdir()
    (tmp_path / "picture" / "a.png").write_text("")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        ensure_shards(_config(tmp_path, **{"name": "corpus", **data}))


def test_sections_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="give val or val_fraction, not both"):
        _config(tmp_path, name="corpus", train="a", val="b", val_fraction=0.1)
    with pytest.raises(ValueError, match="give text_column or adapter, not both"):
        _config(tmp_path, name="huggingface", path="a", adapter="c4", text_column="b")
    config = _config(tmp_path, name="corpus", train="a").model_dump()
    both = Config.model_validate({**config, "prepare": {"input": "a", "output": "b"}})
    with pytest.raises(ConfigError, match="makes its shards by itself, but there is a `prepare` section too"):
        ensure_shards(both)


def test_a_hundredth_is_held_out_unless_the_config_says_otherwise(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(2000)))
    ready = _ready(_config(tmp_path, name="corpus", train=str(tmp_path / "rows.jsonl")))
    assert read_manifest(Path(str(ready.train)).parent).options["val_fraction"] == 0.01
    assert 5 < len(_split(ready, "val")) < 50
