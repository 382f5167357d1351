"""Hugging Face datasets: saved to disk, of data files in a folder, and by name on the Hub."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest

from llmtrain.config.sections.schema import Config
from llmtrain.data.files.datasets import DatasetPart, open_dataset
from llmtrain.data.manifest import read_manifest
from llmtrain.data.prepare.token_shards import ensure_shards, prepare
from llmtrain.data.sources import open_source
from llmtrain.errors import ConfigError


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    open_dataset.cache_clear()
    yield
    open_dataset.cache_clear()


def _config(folder: Path, source: Any, **options: Any) -> Config:
    section = {
        "input": source,
        "output": str(folder / "out"),
        "val_fraction": 0.2,
        "tokenizer": {"vocab_size": 300},
        "keep_text": True,
        **options,
    }
    data = {"name": "tokens", "train": str(folder / "out/train"), "seq_len": 16}
    return Config.model_validate({"data": data, "prepare": section})


def _made(folder: Path) -> dict[str, str]:
    """Texts by their source, over both splits."""
    files = sorted((folder / "out").rglob("*.parquet"))
    return {row["source"]: row["text"] for file in files for row in pq.read_table(file).to_pylist()}


def _saved(folder: Path) -> Path:
    rows = {name: [{"text": f"{name} {n}", "label": n} for n in range(100)] for name in ("train", "test")}
    whole = datasets.DatasetDict({name: datasets.Dataset.from_list(rows[name]) for name in rows})
    whole.save_to_disk(str(folder / "saved"))
    return folder / "saved"


def _repository(folder: Path) -> Path:
    """A folder like a data set's repository on the Hub: configurations in its card, files of rows, no script."""
    root = folder / "wiki"
    for name in ("20231101.en", "20231101.fr"):
        (root / name).mkdir(parents=True)
        rows = [{"id": f"{name[-2:]}{n}", "url": "u", "title": f"T{n}", "text": f"{name} {n}"} for n in range(40)]
        (root / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (root / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: 20231101.en\n  data_files: 20231101.en/*.jsonl\n"
        "- config_name: 20231101.fr\n  data_files: 20231101.fr/*.jsonl\n---\n"
    )
    return root


def test_a_dataset_on_disk_is_read_like_a_folder(tmp_path: Path) -> None:
    prepare(_config(tmp_path, str(_saved(tmp_path))))
    assert _made(tmp_path) == {f"saved/train:{n}": f"train {n}" for n in range(100)}


def test_of_a_dataset_on_disk_with_one_split_that_one_is_read(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": f"t{n}"} for n in range(50)], split="test").save_to_disk(tmp_path / "one")
    prepare(_config(tmp_path, str(tmp_path / "one")))
    assert _made(tmp_path) == {f"one/test:{n}": f"t{n}" for n in range(50)}


@pytest.mark.parametrize(
    ("split", "wanted"),
    [
        ("test", [f"test {n}" for n in range(100)]),
        ("train[:10%]", [f"train {n}" for n in range(10)]),
        ("train[90:]+test[:5%]", [*(f"train {n}" for n in range(90, 100)), *(f"test {n}" for n in range(5))]),
    ],
)
def test_slices_of_a_dataset_on_disk(tmp_path: Path, split: str, wanted: list[str]) -> None:
    prepare(_config(tmp_path, {"path": str(_saved(tmp_path)), "split": split}))
    assert _made(tmp_path) == {f"saved/{split}:{n}": text for n, text in enumerate(wanted)}


def test_configurations_are_subsets_with_folders_of_their_own(tmp_path: Path) -> None:
    source = {"path": str(_repository(tmp_path)), "configs": ["20231101.en", "20231101.fr"], "split": "train[:50%]"}
    config = _config(tmp_path, source, adapter="wikipedia")
    prepare(config)
    assert _made(tmp_path) == {
        f"wiki/train[:50%]/20231101.{language}:{language}{n}": f"T{n}\n\n20231101.{language} {n}"
        for language in ("en", "fr")
        for n in range(20)
    }
    manifest = read_manifest(tmp_path / "out")
    assert [shard.path for split in manifest.splits.values() for shard in split.shards] == [
        f"{split}/20231101.{language}/shard_00000.parquet" for split in ("train", "val") for language in ("en", "fr")
    ]
    whole = open_source(str(tmp_path / "out/train"), key="data.train").stream.num_tokens
    parts = [
        open_source(str(tmp_path / f"out/train/20231101.{name}"), key="data.train").stream.num_tokens
        for name in ("en", "fr")
    ]
    assert whole == sum(parts) == manifest.splits["train"].tokens
    ensure_shards(config)  # nothing has changed
    (tmp_path / "wiki/20231101.fr/more.jsonl").write_text('{"id": "x", "title": "x", "url": "u", "text": "x"}\n')
    with pytest.raises(ConfigError, match=r"the files of the input .* have changed"):
        ensure_shards(config)


def test_a_name_on_the_hub_is_fetched_with_its_configuration_split_and_revision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = _repository(tmp_path)
    load, asked = datasets.load_dataset, []

    def from_the_hub(name: str, config: str | None, **options: Any) -> Any:
        asked.append((name, config, options["split"], options.pop("revision")))
        return load(str(root), config, **options)

    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    monkeypatch.setattr("llmtrain.data.files.datasets.hub_answers", lambda: True)
    source = {
        "path": "hf://wikimedia/wikipedia",
        "configs": ["20231101.fr"],
        "split": "train[:25%]",
        "revision": "b04c8d1",
    }
    config = _config(tmp_path, source, adapter="wikipedia")
    prepare(config)
    assert asked == [("wikimedia/wikipedia", "20231101.fr", "train[:25%]", "b04c8d1")]
    assert set(_made(tmp_path)) == {f"wikimedia/wikipedia/train[:25%]/20231101.fr:fr{n}" for n in range(10)}
    [record] = read_manifest(tmp_path / "out").inputs
    assert record.path == "hf://wikimedia/wikipedia 20231101.fr train[:25%] at b04c8d1"
    open_dataset.cache_clear()
    ensure_shards(config)
    assert len(asked) == 1  # what is prepared is not fetched again
    with pytest.raises(ConfigError, match=r"prepare\.input was hf://wikimedia/wikipedia 20231101\.fr train\[:25%\]"):
        ensure_shards(_config(tmp_path, {**source, "split": "train"}, adapter="wikipedia"))


def test_without_a_connection_a_name_on_the_hub_is_one_quick_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    began = time.perf_counter()
    with pytest.raises(ConfigError, match="dataset hf://nobody/nothing train: cannot be fetched from the Hub") as error:
        prepare(_config(tmp_path, "hf://nobody/nothing"))
    assert time.perf_counter() - began < 10
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "saved", "split": "validation"}, r"dataset saved validation: "),
        ({"path": "saved", "configs": ["en"]}, "has no configurations"),
        ({"path": "wikimedia/wikipedia"}, "no such folder .* write hf://wikimedia/wikipedia"),
        ({"path": "wiki", "configs": ["20231101.xx"]}, r"dataset wiki 20231101\.xx train: .*20231101\.xx"),
    ],
)
def test_what_a_dataset_has_not_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: dict[str, Any], message: str
) -> None:
    _saved(tmp_path)
    _repository(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        prepare(_config(tmp_path, source))


def test_subsets_that_an_adapter_gives_have_folders_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    rows = [{"text": f"t{n}", "meta": {"pile_set_name": ["Pile-CC", "Wikipedia (en)"][n % 2]}} for n in range(60)]
    (tmp_path / "in" / "00.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare(_config(tmp_path, str(tmp_path / "in"), adapter="pile"))
    assert sorted(path.name for path in (tmp_path / "out/train").iterdir()) == ["Pile-CC", "Wikipedia-en"]
    assert _made(tmp_path) == {f"in:00.jsonl:{n}": f"t{n}" for n in range(60)}
    for name, parity in (("Pile-CC", 0), ("Wikipedia-en", 1)):
        for split in ("train", "val"):
            sources = pq.read_table(tmp_path / "out" / split / name).column("source").to_pylist()
            assert {int(source.rpartition(":")[2]) % 2 for source in sources} == {parity}


def test_a_part_is_described_as_the_manifest_keeps_it() -> None:
    assert str(DatasetPart("hf://a/b", None, "train", None)) == "hf://a/b train"
    assert str(DatasetPart("hf://a/b", "en", "train[:1%]", "v1")) == "hf://a/b en train[:1%] at v1"
