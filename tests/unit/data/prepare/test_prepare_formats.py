"""Every kind of file, packed or not, gives the same documents; a bad one is named with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.prepare import documents
from llmtrain.data.prepare.documents import CorpusDocument, open_corpus
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.errors import ConfigError

ROWS = [{"id": f"n{n}", "text": f"document {n}\n\u2028 é 汉字 " + "x" * (n % 7)} for n in range(1000)]
TEXTS = [row["text"] for row in ROWS]


def _lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=300)
    return bytes(sink.getvalue())


def _arrow(rows: list[dict[str, Any]], *, is_file: bool) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=300)
    return bytes(sink.getvalue())


def _zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


FORMATS: dict[str, Callable[[], bytes]] = {
    "rows.jsonl": lambda: _lines(ROWS),
    "array.json": lambda: json.dumps(ROWS).encode(),
    "pretty.json": lambda: json.dumps(ROWS, indent=2, ensure_ascii=False).encode(),
    "objects.json": lambda: "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
    "lines.json": lambda: b"\xef\xbb\xbf" + _lines(ROWS),
    "rows.parquet": lambda: _parquet(ROWS),
    "file.arrow": lambda: _arrow(ROWS, is_file=True),
    "stream.arrow": lambda: _arrow(ROWS, is_file=False),
    "wrapped.json": lambda: json.dumps({"version": 1, "data": ROWS}, indent=1).encode(),
    "rows.jsonl.gz": lambda: gzip.compress(_lines(ROWS)),
    "members.jsonl.gz": lambda: gzip.compress(_lines(ROWS[:500])) + gzip.compress(_lines(ROWS[500:])),
    "rows.jsonl.zst": lambda: _zstd(_lines(ROWS)),
    "frames.jsonl.zst": lambda: _zstd(_lines(ROWS[:500])) + _zstd(_lines(ROWS[500:])),
    "array.json.gz": lambda: gzip.compress(json.dumps(ROWS).encode()),
    "array.json.zst": lambda: _zstd(json.dumps(ROWS).encode()),
    "rows.parquet.gz": lambda: gzip.compress(_parquet(ROWS)),
    "rows.parquet.zst": lambda: _zstd(_parquet(ROWS)),
    "file.arrow.gz": lambda: gzip.compress(_arrow(ROWS, is_file=True)),
    "stream.arrow.zst": lambda: _zstd(_arrow(ROWS, is_file=False)),
}


def _read(path: Path, **options: Any) -> list[tuple[int, CorpusDocument]]:
    """Documents with their rows in the file."""
    config = PrepareConfig.model_validate({"input": str(path), "output": "out", **options})
    reader = open_corpus(find_inputs(config), config)
    found = []
    lines = 0
    for piece in reader.pieces():
        content = reader.read(piece)
        first = lines if piece.unit.files[0].format == "jsonl" else piece.unit.start
        found += [(first + document.row, document) for document in content.documents]
        lines += content.num_lines
    return found


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block", [1 << 22, 1000])
def test_rows_of_every_format_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, block: int
) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", block)
    (tmp_path / name).write_bytes(FORMATS[name]())
    found = _read(tmp_path / name)
    assert [document.error for _, document in found if document.error] == []
    assert [(row, document.id, document.text) for row, document in found] == [
        (index, row["id"], row["text"]) for index, row in enumerate(ROWS)
    ]


@pytest.mark.parametrize("pack", [gzip.compress, _zstd])
def test_a_packed_text_file_is_one_document(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    name = "a.py.gz" if pack is gzip.compress else "a.md.zst"
    text = "def f():\r\n  return 'é'\n" * 1000
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert [document.text for _, document in _read(tmp_path / name)] == [text]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{\n "text": "one",\n "more": [1, 2, {"a": null}]\n}\n')
    assert [(row, document.text) for row, document in _read(tmp_path / "a.json")] == [(0, "one")]


@pytest.mark.parametrize("content", ["", " \n", "[]", " [ ] \n"])
def test_a_json_file_of_nothing_has_no_documents(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    assert _read(tmp_path / "a.json") == []


@pytest.mark.parametrize(
    ("content", "texts", "line", "message"),
    [
        (
            '[{"text": "a"},\n {"text": \n nope}]',
            ["a"],
            3,
            "is no JSON (Expecting value); what comes after it is not read",
        ),
        ('[{"text": "a"},\n\n', ["a"], 3, "is no JSON (Expecting value); what comes after it is not read"),
        (
            '[{"text": "a"}]\n{"text": "b"}',
            ["a"],
            2,
            "is no JSON (there is more after the end of the array); what comes after it is not read",
        ),
        ('{"text": "a"}\n{"text": nope}\n{"text": "c"}', ["a", "c"], 2, "is no JSON (Expecting value)"),
        ('{"text": "a"}\n{"text": "', ["a"], 2, "is no JSON (Unterminated string starting at)"),
        ('[{"text": "a"},\n7]', ["a"], 2, "is a number, not an object with keys and values"),
        ('[{"text": "a"},\n{"body": "b"}]', ["a"], 2, "has no field 'text', only 'body'"),
    ],
)
def test_what_is_wrong_in_a_json_file_is_named_with_its_line(
    tmp_path: Path, content: str, texts: list[str], line: int, message: str
) -> None:
    (tmp_path / "a.json").write_text(content)
    found = [document for _, document in _read(tmp_path / "a.json", text_column="text")]
    assert [document.text for document in found if document.error is None] == texts
    assert [(document.line, document.error) for document in found if document.error] == [(line, message)]


def test_json_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    assert "is not UTF-8 text (byte 0xe9" in str([document.error for _, document in _read(tmp_path / "a.json")])


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl.gz", gzip.compress(_lines(ROWS))[:-2000]),
        ("a.jsonl.zst", b"no such packing"),
        ("a.json.gz", b"no such packing"),
        ("a.txt.zst", b"no such packing"),
        ("a.parquet", b"PAR1 no such file"),
        ("a.arrow", b"ARROW1 no such file"),
        ("b.arrow", _arrow(ROWS, is_file=False)[:-2000]),
        ("a.parquet.gz", gzip.compress(_parquet(ROWS))[:-2000]),
    ],
)
def test_a_damaged_file_is_one_error_in_its_place(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    *good, (_, bad) = _read(tmp_path / name)
    assert [document.error for _, document in good] == [None] * len(good)
    assert bad.error is not None
    assert bad.error.startswith("cannot be read (")


def test_bad_rows_of_parquet_are_named_by_their_number(tmp_path: Path) -> None:
    rows = [{"text": None if n == 700 else f"text {n}"} for n in range(900)]
    (tmp_path / "a.parquet").write_bytes(_parquet(rows))
    errors = [(document.line, document.error) for _, document in _read(tmp_path / "a.parquet") if document.error]
    assert errors == [(701, "field 'text' is null, not text")]


def test_a_column_that_a_table_lacks_is_named_beside_those_that_it_has(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(_parquet(ROWS))
    options = PrepareConfig(input=str(tmp_path / "a.parquet"), output=str(tmp_path / "out"), text_column="body")
    with pytest.raises(ConfigError, match=r"a\.parquet: has no field 'body', only 'id', 'text'"):
        open_corpus(find_inputs(options), options)


def test_a_row_inside_a_json_object_is_named_by_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n{"rows": [{"text": "a"}, {"text": 1}]}')
    [(_, good), (_, bad)] = _read(tmp_path / "a.json")
    assert (good.text, bad.line, bad.error) == ("a", 2, "rows[1] field 'text' is int, not text")


def test_text_that_is_encoded_by_a_dictionary_is_text(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    assert [document.text for _, document in _read(tmp_path / "a.parquet")] == ["a", "b", "a"]


def test_a_parquet_file_without_text_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(_parquet([{"text": 1, "words": "a"}]))
    with pytest.raises(
        ConfigError, match=r"a\.parquet: none of the usual .* 'text' \(int64\), 'words': .*prepare\.text_column"
    ):
        _read(tmp_path / "a.parquet")
    assert [document.text for _, document in _read(tmp_path / "a.parquet", text_column="words")] == ["a"]


def test_a_packed_file_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 4096)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(_lines(ROWS)))
    config = PrepareConfig(input=str(tmp_path / "a.jsonl.gz"), output="out")
    pieces = list(open_corpus(find_inputs(config), config).pieces())
    assert len(pieces) > 8
    assert all(isinstance(piece.data, bytes) and len(piece.data) < 2 * 4096 for piece in pieces)
    assert sum(piece.num_bytes for piece in pieces) == (tmp_path / "a.jsonl.gz").stat().st_size
