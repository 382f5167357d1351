"""What there is at a path: files of known formats, datasets, or a message that says what to give instead."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from llmtrain.data.files.read import Row, read_rows
from llmtrain.errors import ConfigError

ROWS: list[dict[str, Any]] = [{"prompt": "one", "completion": " two"}, {"prompt": "a", "completion": " b"}]


def read(path: object, **options: Any) -> list[tuple[str, Any]]:
    """(source's end, values or message) of each row or fault."""
    return [
        (item.source.rsplit("/", 1)[-1], item.values if isinstance(item, Row) else item.message)
        for item in read_rows(str(path), key="data.train", **options)
    ]


def test_folders_globs_compressed_files_and_urls(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "b.jsonl").write_text(json.dumps(ROWS[0]))
    (tmp_path / "deep" / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[1]).encode()))
    (tmp_path / "notes.md").write_text("no rows")
    both = [("b.jsonl:1", ROWS[0]), ("a.jsonl.gz:1", ROWS[1])]
    assert read(tmp_path) == both
    assert read(tmp_path / "**" / "*.jsonl*") == both
    with fsspec.open("memory://chat/rows.jsonl", "w") as stream:
        stream.write(json.dumps(ROWS[0]))
    assert read("memory://chat/*.jsonl") == [("rows.jsonl:1", ROWS[0])]


@pytest.mark.parametrize(
    ("names", "path", "message"),
    [
        ([], "", "there are no rows at"),
        (["notes.md"], "", "it has notes.md, which is of no such kind"),
        (["notes.md"], "notes.md", "is of no known kind"),
        (["train.jsonl", "my_test.jsonl"], "", "which must not be mixed"),
        (["a.jsonl"], "b.jsonl", "no such file"),
        (["a.jsonl"], "*.csv", "there are no rows at"),
    ],
)
def test_paths_without_rows_are_config_errors(tmp_path: Path, names: list[str], path: str, message: str) -> None:
    for name in names:
        (tmp_path / name).write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match=message):
        read_rows(str(tmp_path / path), key="data.train")


def test_a_file_named_twice_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}')
    with pytest.raises(ConfigError, match=r"a\.jsonl is named twice"):
        read_rows([str(file), str(tmp_path)], key="data.train")


def test_datasets_of_the_hub_are_named_with_configuration_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load(name: str, config: str | None, *, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((name, config, split))
        if name == "owner/none":
            raise ConnectionError("offline")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr("llmtrain.data.files.datasets.hub_answers", lambda: True)
    assert read("hf://owner/name@en:train[:10%]")[0] == ("name:train[:10%]:1", ROWS[0])
    assert read("hf://name", default_split="validation")[1] == ("name:validation:2", ROWS[1])
    assert asked == [("owner/name", "en", "train[:10%]"), ("name", None, "validation")]
    with pytest.raises(ConfigError, match=r"^data\.train: dataset hf://owner/none train: cannot be fetched"):
        read_rows("hf://owner/none", key="data.train")
