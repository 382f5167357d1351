"""Rows at addresses: the same rows as in files of this machine, whatever the format."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llmtrain.data.convert.inputs import find_inputs
from llmtrain.data.files.find import DataFile, find_rows
from llmtrain.data.files.read import Row, read_rows, rows_of
from llmtrain.data.files.row_faults import RowFault
from llmtrain.errors import ConfigError
from llmtrain.storage.failures import StorageError
from llmtrain.storage.store import forget_stores, locate, open_store
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3

ROWS: list[dict[str, Any]] = [{"prompt": f"question {number}", "completion": "x" * number} for number in range(700)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def files() -> dict[str, bytes]:
    table = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=50)
    csv = "prompt,completion\n" + "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    return {
        "rows.jsonl": LINES,
        "rows.json": json.dumps(ROWS).encode(),
        "rows.csv": csv.encode(),
        "rows.parquet": table.getvalue().to_pybytes(),
        "rows.jsonl.gz": gzip.compress(LINES),
        "rows.parquet.gz": gzip.compress(table.getvalue().to_pybytes()),
    }


@pytest.fixture(params=["s3", "lakefs"])
def root(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        server: LocalS3 = request.getfixturevalue("s3")
        root = f"{server.make_bucket('rows')}/formats"
        for name, content in files().items():
            store, key = locate(f"{root}/{name}")
            store.write(key, content)
        return root
    lake: LocalLakeFS = request.getfixturevalue("lake")
    lake.commit("repo", "main", {f"formats/{name}": content for name, content in files().items()})
    return "lakefs://repo/main/formats"


def test_every_format_is_read(root: str) -> None:
    for name in files():
        read = list(read_rows(f"{root}/{name}", key="data.train"))
        assert [row.values for row in read if isinstance(row, Row)] == ROWS
        if name == "rows.jsonl":
            assert isinstance(read[2], Row)
            assert read[2].source == f"{root}/rows.jsonl:3"


def test_a_file_that_was_found_can_be_sent_to_another_process(root: str) -> None:
    found = find_rows(f"{root}/*.jsonl", key="data.train")
    there = pickle.loads(pickle.dumps(found))
    assert there == found
    assert isinstance(there[0], DataFile)
    assert there[0].size == len(LINES)
    assert len(list(rows_of(there))) == len(ROWS)


def test_a_folder_a_glob_and_convert_take_the_files_with_rows() -> None:
    store = open_store("memory://folders/")
    for name in ("a.jsonl", "sub/b.jsonl", "readme.txt", "_SUCCESS", "only/text.txt", "mixed/train.jsonl"):
        store.write(name, LINES)
    store.write("mixed/test.jsonl", LINES)
    assert len(list(read_rows("memory://folders/sub", key="data.train"))) == len(ROWS)
    names = [one.name for one in find_inputs(["memory://folders/s*/*"], split=None, subset=None, apart=True)]
    assert names == ["sub/b.jsonl"]
    with pytest.raises(ConfigError, match=r"data.train: there are no rows at memory://folders/only; it has text.txt"):
        list(read_rows("memory://folders/only", key="data.train"))
    with pytest.raises(ConfigError, match="must not be mixed: name one of them"):
        list(read_rows("memory://folders/mixed", key="data.train"))
    with pytest.raises(ConfigError, match="is named twice"):
        list(read_rows(["memory://folders/a.jsonl", "memory://folders/a*"], key="data.train"))
    with pytest.raises(ConfigError, match=r"data.train: memory://folders/nope: there is no such object"):
        list(read_rows("memory://folders/nope", key="data.train"))


def test_a_store_that_is_down_is_no_mistake_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmtrain.storage.failures.FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    forget_stores()
    with pytest.raises(StorageError, match=r"data.train: s3://b/x.jsonl: http://127.0.0.1:9 .* try again"):
        list(read_rows("s3://b/x.jsonl", key="data.train"))
    forget_stores()


def test_a_file_that_shrinks_while_it_is_read_is_a_fault(tmp_path: Path) -> None:
    store = open_store("memory://shrinks/")
    store.write("x.jsonl", LINES)
    (found,) = find_rows("memory://shrinks/x.jsonl", key="data.train")
    store.write("x.jsonl", LINES[:1000])
    (*_, last) = rows_of([found])
    assert isinstance(last, RowFault)
    assert "the object ends before byte" in str(last)


def test_a_file_address_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a b.jsonl").write_bytes(LINES)
    read = list(read_rows(f"file://{tmp_path}/a%20b.jsonl", key="data.train"))
    assert len(read) == len(ROWS)
    assert isinstance(read[0], Row)
    assert read[0].source == f"{tmp_path}/a b.jsonl:1"
