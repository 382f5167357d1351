"""Adapters, each with rows in the shape of the real data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.files.row_faults import RowError
from llmtrain.data.prepare.adapters import Found, load_adapter
from llmtrain.errors import ConfigError

PILE = {"text": "It is done, and submitted.", "meta": {"pile_set_name": "Pile-CC"}}
C4 = {"text": "Beginners BBQ Class!", "timestamp": "2019-04-25T12:57:54Z", "url": "https://klyq.com/beginners-bbq"}
SHAPES: list[tuple[str, dict[str, Any], Found]] = [
    ("plain", {"text": "a b", "id": 7}, Found(None, "a b")),
    (
        "wikipedia",
        {"id": "12", "url": "https://en.wikipedia.org/wiki/Anarchism", "title": "Anarchism", "text": "Anarchism is a"},
        Found("12", "Anarchism\n\nAnarchism is a"),
    ),
    (
        "fineweb",
        {
            "text": "|Viewing Single Post",
            "id": "<urn:uuid:39147604-bfbe-4ed5-b19c-54105f8ae8a7>",
            "dump": "CC-MAIN-2013-20",
            "url": "http://daytoninformer.com/post",
            "date": "2013-05-18T05:48:59Z",
            "file_path": "s3://commoncrawl/crawl-data/CC-MAIN-2013-20/segments/1368696381249/warc/0.warc.gz",
            "language": "en",
            "language_score": 0.82,
            "token_count": 142,
        },
        Found("<urn:uuid:39147604-bfbe-4ed5-b19c-54105f8ae8a7>", "|Viewing Single Post"),
    ),
    ("c4", C4, Found(C4["url"], C4["text"])),
    (
        "redpajama",
        {"text": "\\section{Introduction}", "meta": {"timestamp": "2007", "arxiv_id": "0704.0001", "language": "en"}},
        Found("0704.0001", "\\section{Introduction}"),
    ),
    (
        "redpajama",
        {"text": "x", "meta": "{'title': 'A', 'url': 'https://a.org/b'}", "red_pajama_subset": "wikipedia"},
        Found("https://a.org/b", "x", "wikipedia"),
    ),
    ("redpajama", {"text": "x", "meta": {"redpajama_set_name": "RedPajamaC4"}}, Found(None, "x", "RedPajamaC4")),
    (
        "redpajama",
        {
            "raw_content": "y",
            "doc_id": "2019-09/0000/en_head.json.gz/0",
            "meta": '{"url": "u"}',
            "quality_signals": "{}",
        },
        Found("2019-09/0000/en_head.json.gz/0", "y"),
    ),
    ("pile", PILE, Found(None, "It is done, and submitted.", "Pile-CC")),
    ("pile", {**PILE, "meta": json.dumps(PILE["meta"])}, Found(None, "It is done, and submitted.", "Pile-CC")),
    (
        "refinedweb",
        {
            "content": "Blog post",
            "url": "http://a.com/1",
            "timestamp": "2013-05-18",
            "dump": "CC-MAIN-2013-20",
            "segment": "1368696381249",
            "image_urls": [["http://a.com/b.png", ""]],
        },
        Found("http://a.com/1", "Blog post"),
    ),
    ("default", {"id": 3, "text": "a"}, Found("3", "a")),
    ("default", {"id": None, "text": "a"}, Found(None, "a")),
]


@pytest.mark.parametrize(("name", "row", "found"), SHAPES)
def test_a_row_of_the_real_shape_gives_its_text(name: str, row: dict[str, Any], found: Found) -> None:
    adapter = load_adapter(name)
    assert adapter.read(row, text_column="text") == found
    wanted = adapter.columns_to_read("text")
    assert wanted is not None
    assert adapter.read({key: value for key, value in row.items() if key in wanted}, text_column="text") == found


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("wikipedia", {"id": "1", "text": "x"}, r"has no field 'title', only 'id', 'text' \(adapter wikipedia\)"),
        ("c4", {"url": "u", "text": None}, r"the text is NoneType, not a string \(adapter c4\)"),
        ("plain", {"text": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_row_of_another_shape_is_an_error(name: str, row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        load_adapter(name).read(row, text_column="text")


MINE = """
def tuples(row): return row["n"], row["body"].upper(), "set"
def plain(row): return row["body"]
def drops(row): return None
def wrong(row): return 7
def fails(row): return 1 / 0
number = 3
"""


def test_adapters_of_ones_own_are_named_by_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_adapters.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    row = {"n": 5, "body": "text"}

    def read(name: str) -> Found:
        return load_adapter(f"my_adapters:{name}").read(row, text_column="")

    assert read("tuples") == Found("5", "TEXT", "set")
    assert read("plain") == Found(None, "text")
    assert read("drops") == Found(None, "")
    with pytest.raises(RowError, match=r"gave int, not \(id, text\)"):
        read("wrong")
    with pytest.raises(RowError, match=r"adapter my_adapters:fails failed \(ZeroDivisionError"):
        read("fails")
    one = load_adapter("my_adapters:tuples")
    assert one.columns_to_read("") is None
    (tmp_path / "my_adapters.py").write_text(MINE + "# more\n")
    assert load_adapter("my_adapters:tuples").source_sha256 not in (None, one.source_sha256)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikipedai", "there is no adapter 'wikipedai'; did you mean wikipedia"),
        ("nowhere:f", r"nowhere cannot be imported \(ModuleNotFoundError"),
        ("json:nothing", "json has no function or class 'nothing'"),
        ("json:__name__", "json has no function or class '__name__'"),
    ],
)
def test_an_adapter_that_is_not_there_is_a_clear_error(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_adapter(name)


def test_a_text_column_goes_with_the_default_adapter_alone() -> None:
    with pytest.raises(ValueError, match="give text_column or adapter, not both"):
        PrepareConfig(input="x", output="y", adapter="c4", text_column="text")
