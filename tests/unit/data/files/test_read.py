"""Rows: read from every kind of file, each with its place, and every fault told by file and line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.data.files.find import find_rows
from llmtrain.data.files.read import Row, layout_of, read_rows
from llmtrain.data.files.row_faults import RowFault
from llmtrain.errors import ConfigError

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


def test_a_first_line_with_more_than_its_object_is_a_bad_line(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "é"},\n{"text": "b"}\n')
    fault, row = read(tmp_path / "rows.jsonl")
    assert fault == ("rows.jsonl:1", "is no JSON (Extra data at character 14)")
    assert row == ("rows.jsonl:2", {"text": "b"})


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


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("layout", ["array", "one line", "lines", "pretty"])
def test_json_files_of_every_layout_give_the_line_where_a_row_begins(tmp_path: Path, layout: str, suffix: str) -> None:
    file = tmp_path / f"rows{suffix}"
    text, lines = {
        "array": (json.dumps(ROWS, indent=2), [2, 6]),
        "one line": (json.dumps(ROWS), [1, 1]),
        "lines": ("".join(json.dumps(row) + "\n" for row in ROWS), [1, 2]),
        "pretty": ("\n".join(json.dumps(row, indent=1) for row in ROWS), [1, 5]),
    }[layout]
    file.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    assert read(file) == [(f"rows{suffix}:{line}", row) for line, row in zip(lines, ROWS, strict=True)]


TURNS = [{"role": "user", "content": "a"}]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    ("document", "rows", "layout"),
    [
        ({"version": 1, "data": ROWS}, ROWS, "the list 'data' of one object, without its 'version'"),
        ({"our_rows": ROWS}, ROWS, "the list 'our_rows' of one object"),
        ({"train": ROWS[:1], "seed": None}, ROWS[:1], "the list 'train' of one object, without its 'seed'"),
        ({"conversations": [{"messages": TURNS}]}, [{"messages": TURNS}], "the list 'conversations' of one object"),
        ({"messages": []}, None, "one object"),
        ({"messages": [{"content": "q"}]}, None, "one object"),
        ({"data": []}, [], "the list 'data' of one object"),
        ({"messages": TURNS}, None, "one object"),
        ({"conversations": [{"from": "human", "value": "a"}], "data": ROWS}, None, "one object"),
        ({"text": "a", "items": [{"b": 1}]}, None, "one object"),
        ({"story": "a", "people": [{"b": 1}]}, None, "one object"),
        ({"a": [1, 2]}, None, "one object"),
        ({}, None, "one object"),
    ],
)
def test_one_object_is_a_row_or_stands_around_a_list_of_rows(
    document: dict[str, Any], rows: list[Any] | None, layout: str, suffix: str, indent: int | None, tmp_path: Path
) -> None:
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(document, indent=indent))
    is_line = suffix == ".jsonl" and rows is None and (indent is None or not document)
    [source] = find_rows(str(file), key="data.train")
    assert layout_of(source) == ("one object a line" if is_line else layout)
    found = read(file)
    if rows is None:
        assert found == [(f"{file.name}:1", document)]
    elif not rows:
        assert [message for _, message in found] == ["is empty: it has no rows"]
    else:
        key = layout.split("'")[1]
        assert found == [(f"{file.name}:1 ({key}[{index}])", row) for index, row in enumerate(rows)]


def test_an_object_with_several_lists_of_rows_is_a_fault(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps({"train": ROWS, "test": ROWS}))
    message = "is one object with several lists of rows, 'train' and 'test': make a file of each"
    assert read(file) == [("rows.json:1", message)]


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
        ("rows.csv:5", "has 1 field, but the first line names 2 columns"),
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


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b'{"text": "a"}', mtime=0), "gzip: let its name end in .gz"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16: save"),
    ],
)
def test_a_file_that_is_no_utf8_text_is_told_by_its_first_bytes(tmp_path: Path, content: bytes, what: str) -> None:
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_bytes(content)
        assert what in read(tmp_path / name)[0][1]


def test_a_cell_that_is_nested_too_deeply_is_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("prompt,completion\n" + "[" * 5000 + ",b\n")
    assert read(tmp_path / "rows.csv") == [("rows.csv:2", {"prompt": "[" * 5000, "completion": "b"})]


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


def _arrow(is_file: bool) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(ROWS)
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def _parquet() -> bytes:
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "file.arrow", "stream.arrow"])
def test_every_format_may_be_compressed(tmp_path: Path, name: str, suffix: str) -> None:
    data = {
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode(),
        "rows.json": json.dumps(ROWS).encode(),
        "rows.csv": 'prompt,completion\n"one,\n""two"" é"," three"\na," b"\n'.encode(),
        "rows.parquet": _parquet(),
        "file.arrow": _arrow(is_file=True),
        "stream.arrow": _arrow(is_file=False),
    }[name]
    compressed: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".zst": _zstd}
    (tmp_path / f"{name}{suffix}").write_bytes(compressed[suffix](data))
    assert [values for _, values in read(tmp_path / f"{name}{suffix}")] == ROWS


def test_objects_of_the_json_type_of_datasets_are_read_as_that_library_reads_them(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"city": "Paris"}}]}], "n": 1},
        {"messages": [{"role": "assistant", "tool_calls": [{"arguments": {"zoom": 1.5, "on": None}}]}], "n": 2},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json" in str(made.features)
    made.save_to_disk(tmp_path / "saved")
    made.to_parquet(tmp_path / "rows.parquet")
    assert list(made) == rows
    for name in ("saved", "rows.parquet"):
        assert [values for _, values in read(tmp_path / name)] == rows


def test_shuffled_datasets_are_read_in_their_order(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(50)]
    datasets.Dataset.from_list(rows).shuffle(seed=1).save_to_disk(tmp_path / "saved")
    found = [values["text"] for _, values in read(tmp_path / "saved")]
    assert sorted(found, key=int) == [str(number) for number in range(50)] != found


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


@settings(max_examples=30)
@given(st.binary(max_size=60))
def test_no_bytes_make_a_reader_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder = tmp_path_factory.mktemp("bytes")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst", "a.arrow.gz"):
        (folder / name).write_bytes(content)
        assert all(isinstance(item, Row | RowFault) for item in read_rows(str(folder / name), key="data.train"))


@pytest.mark.parametrize("name", ["rows.jsonl", "values.json", "list.json"])
def test_a_key_that_stands_twice_is_a_fault_of_its_row_alone(name: str, tmp_path: Path) -> None:
    """JSON would keep the last value, and lose the first in silence."""
    rows = ['{"prompt": "a", "completion": "b"}', '{"prompt": "a", "meta": {"x": 1, "x": 2}}', '{"prompt": "c"}']
    text = f"[{', '.join(rows)}]" if name == "list.json" else "\n".join(rows)
    (tmp_path / name).write_text(text)
    (_, first), (place, fault), (_, last) = read(tmp_path / name)
    assert (first, last) == ({"prompt": "a", "completion": "b"}, {"prompt": "c"})
    assert place == ("list.json:1" if name == "list.json" else f"{name}:2")
    assert fault == 'the key "x" stands twice in one object: remove one'
