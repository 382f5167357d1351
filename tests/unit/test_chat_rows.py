"""Rows: read from every kind of file, each with its place, and every fault told by file and line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.config.errors import ConfigError
from llmtrain.data.chat.faults import Fault, Faults
from llmtrain.data.chat.rows import Row, read_rows
from llmtrain.data.prepare import hugging_face

ROWS: list[dict[str, Any]] = [{"prompt": 'one,\n"two" é', "completion": " three"}, {"prompt": "a", "completion": " b"}]


def read(path: object, **options: Any) -> list[tuple[str, Any]]:
    """(source's end, values or message) of each row or fault."""
    return [
        (item.source.rsplit("/", 1)[-1], item.values if isinstance(item, Row) else item.message)
        for item in read_rows(str(path), key="data.train", **options)
    ]


def test_jsonl_rows_carry_their_lines_and_blank_lines_are_none(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(ROWS[0]).encode() + b"\r\n\n" + json.dumps(ROWS[1]).encode())
    assert read(file) == [("rows.jsonl:1", ROWS[0]), ("rows.jsonl:3", ROWS[1])]


def test_each_bad_line_is_one_fault_and_reading_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b'{"text": "a"}\n{"text": "b"\n[1]\n{"text": "\xff"}\n7\nnull\n{"text": "c"}\n')
    assert read(file) == [
        ("rows.jsonl:1", {"text": "a"}),
        ("rows.jsonl:2", "is no JSON (Expecting ',' delimiter at character 14)"),
        ("rows.jsonl:3", "is a list, not an object with keys and values"),
        ("rows.jsonl:4", "is not UTF-8 text (byte 0xff: invalid start byte)"),
        ("rows.jsonl:5", "is a number, not an object with keys and values"),
        ("rows.jsonl:6", "is null, not an object with keys and values"),
        ("rows.jsonl:7", {"text": "c"}),
    ]


def test_json_over_several_lines_in_a_jsonl_file_is_one_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(ROWS, indent=1))
    [(source, message)] = read(file)
    assert source == "rows.jsonl:1"
    assert "name it .json" in message


@pytest.mark.parametrize("layout", ["array", "lines", "pretty"])
def test_json_files_of_every_layout_give_the_line_where_a_row_begins(tmp_path: Path, layout: str) -> None:
    file = tmp_path / "rows.json"
    text, lines = {
        "array": (json.dumps(ROWS, indent=2), [2, 6]),
        "lines": ("".join(json.dumps(row) + "\n" for row in ROWS), [1, 2]),
        "pretty": ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5]),
    }[layout]
    file.write_text(text)
    assert read(file) == [(f"rows.json:{line}", row) for line, row in zip(lines, ROWS, strict=True)]


def test_rows_under_a_key_of_a_json_object_are_found(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"version": 1, "data": ROWS}))
    assert read(file) == [("rows.json:1 (data[0])", ROWS[0]), ("rows.json:1 (data[1])", ROWS[1])]


def test_a_json_file_with_one_conversation_is_one_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    row = {"messages": [{"role": "user", "content": "a"}]}
    file.write_text(json.dumps(row))
    assert read(file) == [("rows.json:1", row)]


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[{"a": 1},\n {"a" 2}]', 2, "is no JSON (Expecting ':' delimiter)"),
        ('[{"a": 1}\n {"a": 2}]', 2, "is no JSON (expected , or ] after a value, not '{')"),
        ('[{"a": 1},\n', 2, "is no JSON (Expecting value)"),
        ('[{"a": 1}\n', 2, "is no JSON (the array has no end)"),
        ('[{"a": 1}]\n\nx', 3, "is no JSON (there is more after the end of the array)"),
    ],
)
def test_a_fault_in_a_json_file_names_its_line(tmp_path: Path, text: str, line: int, message: str) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    found = read(file)
    assert found[-1] == (f"rows.json:{line}", f"{message}; what comes after it is not read")
    assert len([item for item in found if isinstance(item[1], str)]) == 1


def test_csv_rows_carry_the_line_on_which_they_begin(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text('prompt,completion\n"one,\n""two"" é", three\na, b\nc\n')
    assert read(file) == [
        ("rows.csv:2", ROWS[0]),
        ("rows.csv:4", ROWS[1]),
        ("rows.csv:5", "has 1 fields, but the first line names 2 columns"),
    ]


def test_csv_cells_may_hold_conversations_and_other_separators(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "rows.csv"
    file.write_text("id;messages\n1;" + json.dumps(json.dumps(turns)).replace('\\"', '""') + "\n")
    assert read(file) == [("rows.csv:2", {"id": "1", "messages": turns})]


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "text\na\n\xff\nb\n"), ("a.json", '[{"text": "a"},\n\n{"text": "\xff"}]')]
)
def test_a_byte_that_is_no_utf8_is_told_with_its_line(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    message = "is not UTF-8 text (byte 0xff: invalid start byte); what comes after it is not read"
    assert read(tmp_path / name)[-1] == (f"{name}:3", message)


def test_a_csv_file_without_names_of_columns_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("a,a\n1,2\n")
    [(source, message)] = read(file)
    assert source == "rows.csv:1"
    assert "should name the columns" in message


def test_parquet_and_datasets_count_rows(tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS[:1])}).save_to_disk(tmp_path / "splits")
    assert read(tmp_path / "rows.parquet") == [("rows.parquet:1", ROWS[0]), ("rows.parquet:2", ROWS[1])]
    assert read(tmp_path / "saved") == [("saved:1", ROWS[0]), ("saved:2", ROWS[1])]
    assert read(tmp_path / "splits") == [("train:1", ROWS[0])]
    with pytest.raises(ConfigError, match=r"dataset .*splits validation: Unknown split"):
        read(tmp_path / "splits", default_split="validation")


def test_shuffled_datasets_are_read_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(50)]
    datasets.Dataset.from_list(rows).shuffle(seed=1).save_to_disk(tmp_path / "saved")
    found = [values["text"] for _, values in read(tmp_path / "saved")]
    assert sorted(found, key=int) == [str(number) for number in range(50)] != found


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
    monkeypatch.setattr(hugging_face, "hub_answers", lambda: True)
    assert read("hf://owner/name@en:train[:10%]")[0] == ("name:train[:10%]:1", ROWS[0])
    assert read("hf://name", default_split="validation")[1] == ("name:validation:2", ROWS[1])
    assert asked == [("owner/name", "en", "train[:10%]"), ("name", None, "validation")]
    with pytest.raises(ConfigError, match=r"^data\.train: dataset hf://owner/none train: cannot be fetched"):
        read_rows("hf://owner/none", key="data.train")


def test_an_empty_or_broken_file_is_a_fault(tmp_path: Path) -> None:
    for name in ("a.csv", "a.json", "a.jsonl"):
        (tmp_path / name).write_text("")
        assert read(tmp_path / name) == [(name, "is empty: it has no rows")]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}')[:-4])
    [(source, message)] = read(tmp_path / "a.jsonl.gz")
    assert (source, message[:15]) == ("a.jsonl.gz", "cannot be read ")
    (tmp_path / "a.parquet").write_text("no parquet")
    [(source, message)] = read(tmp_path / "a.parquet")
    assert (source, message[:42]) == ("a.parquet", "is no Parquet file that can be read, after")


def test_faults_are_listed_up_to_a_limit_and_the_rest_counted() -> None:
    faults = Faults(max_kept=30)
    for line in range(1, 41):
        faults.add(Fault(f"a:{line}", "bad"))
    with pytest.raises(ConfigError) as raised:
        faults.raise_if_any("Do better.")
    lines = str(raised.value).splitlines()
    assert (lines[0], lines[19], lines[20], lines[21]) == ("a:1: bad", "a:20: bad", "… and 20 more", "Do better.")


@settings(max_examples=30)
@given(st.binary(max_size=60))
def test_no_bytes_make_a_reader_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"):
        (folder / name).write_bytes(content)
        assert all(isinstance(item, Row | Fault) for item in read_rows(str(folder / name), key="data.train"))
