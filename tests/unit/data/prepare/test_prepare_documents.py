"""Reading text and JSONL, byte for byte, in blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.files.find import DataFile
from llmtrain.data.files.json_rows import TEXT_KEYS
from llmtrain.data.prepare import documents
from llmtrain.data.prepare.documents import CorpusDocument, CorpusReader, Unit, file_hash, hash_file, open_corpus
from llmtrain.data.prepare.inputs import CorpusFile, CorpusInput
from llmtrain.errors import ConfigError


def _input(folder: Path, files: dict[str, bytes]) -> CorpusInput:
    found = []
    for name, data in files.items():
        (folder / name).write_bytes(data)
        file = DataFile(str(folder / name), "jsonl" if name.endswith("jsonl") else "text")
        found.append(CorpusFile(name, file))
    return CorpusInput("in", str(folder), tuple(found))


def _open(source: CorpusInput, **options: Any) -> CorpusReader:
    return open_corpus([source], PrepareConfig(input=source.path, output="out", **options))


def _read(source: CorpusInput, **options: Any) -> list[CorpusDocument]:
    reader = _open(source, **options)
    return [document for piece in reader.pieces() for document in reader.read(piece).documents]


def test_a_text_file_is_one_document_with_its_line_ends(tmp_path: Path) -> None:
    text = "a\r\nb\rc\n\n d\t\u2028\x85\0é"
    files = {"a.txt": text.encode(), "b.txt": b"\xef\xbb\xbf\xef\xbb\xbfx", "empty.txt": b""}
    assert [document.text for document in _read(_input(tmp_path, files))] == [text, "\ufeffx", ""]


def test_jsonl_rows_count_lines_and_blank_lines_are_nothing(tmp_path: Path) -> None:
    lines = [{"id": 1, "text": "one"}, {"text": "two\u2028\x85\n2"}]
    data = (
        b"\xef\xbb\xbf"
        + json.dumps(lines[0]).encode()
        + b"\r\n\n  \n"
        + json.dumps(lines[1], ensure_ascii=False).encode()
    )
    read = _read(_input(tmp_path, {"a.jsonl": data}))
    assert [(document.row, document.text) for document in read] == [(0, "one"), (3, "two\u2028\x85\n2")]


@settings(deadline=None)
@given(
    lines=st.lists(
        st.one_of(st.text(max_size=30).map(lambda text: json.dumps({"text": text})), st.just("")), max_size=30
    ),
    block=st.integers(1, 60),
    ends=st.booleans(),
)
def test_blocks_of_any_size_give_the_same_documents(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], block: int, ends: bool
) -> None:
    data = ("\n".join(lines) + ("\n" if ends else "")).encode()
    source = _input(tmp_path_factory.mktemp("blocks"), {"a.jsonl": data})
    whole = [document.text for document in _read(source, text_column="text")]
    assert whole == [json.loads(line)["text"] for line in lines if line]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "BLOCK_BYTES", block)
        rows: list[tuple[int, str]] = []
        hashes: list[bytes] = []
        line = 0
        reader = _open(source, text_column="text")
        for piece in reader.pieces():
            content = reader.read(piece)
            rows += [(line + document.row, document.text) for document in content.documents]
            hashes += content.block_hashes[0]
            line += content.num_lines
        assert rows == [(number, json.loads(row)["text"]) for number, row in enumerate(lines) if row]
        assert file_hash(hashes) == hash_file(source.files[0])


def test_small_text_files_share_a_unit_and_large_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 10)
    source = _input(
        tmp_path, {"a": b"x" * 4, "b": b"x" * 6, "c": b"x", "d": b"x" * 25, "e.jsonl": b"{}\n" * 5, "f": b"x"}
    )
    reader = _open(source, text_column="text")
    pieces = list(reader.pieces())
    assert [[file.name for file in piece.unit.files] for piece in pieces] == [
        ["a", "b"], ["c"], ["d"], ["e.jsonl"], ["e.jsonl"], ["f"],
    ]  # fmt: skip
    content = reader.read(pieces[2])
    assert len(content.block_hashes[0]) == 3
    assert file_hash(content.block_hashes[0]) == hash_file(source.files[3])


@pytest.mark.parametrize("field", TEXT_KEYS)
def test_the_text_field_is_found_by_its_name(tmp_path: Path, field: str) -> None:
    data = b"not json\n" + json.dumps({"id": "x", "title": "y", field: "z"}).encode()
    assert [document.text for document in _read(_input(tmp_path, {"a.jsonl": data}))] == ["", "z"]


def test_no_text_field_is_a_clear_error(tmp_path: Path) -> None:
    data = json.dumps({"messages": [], "text": None}).encode()
    with pytest.raises(ConfigError, match=r"a\.jsonl:1: none of the usual .* 'messages', 'text'.*prepare\.text_column"):
        _read(_input(tmp_path, {"a.jsonl": data}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "x"', "is no JSON"),
        (b'{"text": "caf\xe9"}', r"is not UTF-8 text \(byte 0xe9"),
        (b'["text"]', "is a list, not an object with keys and values"),
        (b'{"body": "x"}', "has no field 'text', only 'body'"),
        (b'{"text": null}', "field 'text' is null, not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
        (b"[" * 100_000, "is no JSON"),
        (b'{"text": ' + b"9" * 5000 + b"}", "is no JSON"),
    ],
)
def test_a_bad_line_is_named_and_the_others_are_read(tmp_path: Path, line: bytes, message: str) -> None:
    data = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    good, bad, after = _read(_input(tmp_path, {"a.jsonl": data}), text_column="text")
    assert (good.text, after.text, bad.line, bad.row) == ("a", "b", 3, 2)
    assert bad.error is not None
    with pytest.raises(ConfigError, match=message):
        raise ConfigError(bad.error)


def test_a_text_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    [document] = _read(_input(tmp_path, {"a.txt": b"one\ntwo\nthr\xe9e"}))
    assert document.line == 3
    assert document.error == "is not UTF-8 text (byte 0xe9: invalid continuation byte)"


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_file_that_cannot_be_opened_is_an_error_in_its_place(tmp_path: Path, name: str) -> None:
    source = _input(tmp_path, {name: b"x"})
    (tmp_path / name).unlink()
    [document] = _read(source)
    assert document.error == "cannot be read (No such file or directory)"
    assert hash_file(source.files[0]) == file_hash([])


def test_a_line_longer_than_many_blocks_is_one_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "BLOCK_BYTES", 64)
    text = "x" * 1000
    source = _input(tmp_path, {"a.jsonl": json.dumps({"text": text}).encode() + b'\n{"text": "y"}'})
    units = [piece.unit for piece in _open(source).pieces()]
    assert len(units) == 17
    assert [document.text for document in _read(source)] == [text, "y"]
    assert isinstance(units[0], Unit)
