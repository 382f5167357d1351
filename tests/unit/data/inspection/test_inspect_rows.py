"""`inspect` of bare rows: shapes, lengths and every fault, with no config, tokenizer or model; and its page."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from llmtrain.cli.app import run
from llmtrain.cli.block_text import INDENT, as_text
from llmtrain.data.inspection.rows import holds_rows, inspect_rows
from llmtrain.errors import ConfigError
from llmtrain.reports.block_page import block_page
from llmtrain.reports.blocks import Block, Lines, Passage, Span, Table, Values
from tests.support.tiny_run import write_config
from tests.support.token_shards import write_token_shards

HELLO = {"messages": [{"role": "user", "content": "Hi \x1b[31m<b>"}, {"role": "assistant", "content": "Hé!"}]}
GOOD = [HELLO, {"prompt": "2 + 2 =", "completion": " 4"}, {"instruction": "a", "output": "b"}, {"text": "日本語"}]
BAD = [
    ("{bad", "is no JSON"),
    ('{"messages": [{"role": "usr", "content": "x"}]}', "turn 1 has the unknown role 'usr'; did you mean 'user'?"),
    ('{"messages": [{"role": "user", "content": " "}]}', "turn 1 (user) is empty"),
    ('{"messages": [{"role": "user", "content": "x"}]}', "has no turn of the assistant to learn from"),
    ("[1]", "is a list, not an object with keys and values"),
    ('{"question": "x"}', "has none of the known shapes"),
]


def write_rows(file: Path, *, bad: bool = True) -> Path:
    lines = [json.dumps(row) for row in GOOD] + [line for line, _ in BAD if bad]
    file.write_text("\n".join(lines) + "\n")
    return file


def test_shapes_lengths_and_all_faults_are_found(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl")
    found = inspect_rows(str(file))
    assert found["rows"] == 10
    assert found["shapes"] == {"messages": 1, "prompt + completion": 1, "instruction + output": 1, "text": 1}
    assert (found["characters"]["total"], found["bytes"]["total"]) == (14 + 9 + 2 + 3, 15 + 9 + 2 + 9)
    assert (found["characters"]["shortest"], found["characters"]["longest"]) == (2, 14)
    assert [fault["source"] for fault in found["faults"]] == [f"{file}:{line}" for line in range(5, 11)]
    for fault, (_, message) in zip(found["faults"], BAD, strict=True):
        assert fault["message"].startswith(message)
    assert [row["source"] for row in found["first_rows"]] == [f"{file}:{line}" for line in (1, 2, 3)]
    assert found["first_rows"][1]["pieces"] == [
        {"role": "prompt", "text": "2 + 2 ="},
        {"role": "completion", "text": " 4"},
    ]


def test_more_faults_than_a_message_of_train_shows_are_all_reported(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{x\n" * 1500)
    assert run(["inspect", str(file)]) == 2
    told = capsys.readouterr().out
    assert "1,500 faults\n" in told
    assert all(f"{file}:{line}: is no JSON" in told for line in range(1, 1501))


def test_the_exit_code_says_whether_there_are_faults_and_json_says_the_same(tmp_path: Path, capsys: Any) -> None:
    bad, good = write_rows(tmp_path / "bad.jsonl"), write_rows(tmp_path / "good.jsonl", bad=False)
    assert run(["inspect", str(bad), "--json"]) == 2
    assert json.loads(capsys.readouterr().out) == inspect_rows(str(bad))
    assert run(["inspect", str(good), "--json", "--num-rows", "1"]) == 0
    assert json.loads(capsys.readouterr().out) == inspect_rows(str(good), num_rows=1)
    assert run(["inspect", str(good)]) == 0
    told = capsys.readouterr().out
    assert "    │ Hi \\x1b[31m<b>\n" in told
    assert "  ── assistant\n    │ Hé!" in told


def test_files_of_a_folder_and_a_glob_are_told_apart(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl")
    (tmp_path / "b.csv").write_text("prompt,completion\nx,y\n")
    (tmp_path / "empty.json").write_text("")
    parquet.write_table(pa.Table.from_pylist([{"text": "one"}, {"text": None}]), tmp_path / "c.parquet")
    found = inspect_rows(str(tmp_path))
    counts = {Path(file["name"]).name: (file["rows"], file["faults"]) for file in found["files"]}
    assert counts == {"a.jsonl": (10, 6), "b.csv": (1, 0), "c.parquet": (2, 1), "empty.json": (0, 1)}
    assert found["rows"] == 13
    assert len(inspect_rows(str(tmp_path / "*.csv"))["files"]) == 1
    with pytest.raises(ConfigError, match="no such file"):
        inspect_rows(str(tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("command", "allowed"),
    [(["inspect", "rows.jsonl"], set()), (["inspect", "rows.jsonl", "--html", "page.html"], {"numpy", "pyarrow"})],
)
def test_nothing_heavy_is_imported(tmp_path: Path, command: list[str], allowed: set[str]) -> None:
    write_rows(tmp_path / "rows.jsonl", bad=False)
    script = "import sys; from llmtrain.cli.app import run; run(sys.argv[1:]); print('\\n', *sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, *command], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    imported = {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}
    assert "pydantic" in imported
    heavy = {"torch", "numpy", "pyarrow", "transformers", "tokenizers", "rich", "datasets"}
    assert imported & heavy <= allowed


def test_rows_configs_and_shards_are_told_apart(tmp_path: Path) -> None:
    config = {"data": {"name": "tokens", "train": "x"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "rows.json").write_text(json.dumps(GOOD))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": GOOD}))
    (tmp_path / "broken.json").write_text('[{"a" 1}]')
    (tmp_path / "broken_config.json").write_text('{"data" 1}')
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "rows.parquet")
    write_token_shards(tmp_path / "shards", {"train": [[[[1, 2, 0]]]]}, vocab_size=3, eos_id=0)
    (tmp_path / "bare").mkdir()
    (shard,) = (tmp_path / "shards").rglob("*.parquet")
    (tmp_path / "bare" / "one.parquet").write_bytes(shard.read_bytes())
    names = ["config.json", "rows.json", "wrapped.json", "broken.json", "broken_config.json", "rows.parquet"]
    assert [name for name in names if holds_rows(str(tmp_path / name))] == [
        "rows.json",
        "wrapped.json",
        "broken.json",
        "rows.parquet",
    ]
    assert not any(holds_rows(str(tmp_path / name)) for name in ("shards", "bare", "bare/*.parquet", "nowhere"))
    assert holds_rows("s3://bucket/rows.jsonl")
    assert holds_rows("hf://owner/name")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--split", "val"], "--split does not apply"),
        (["--num-items", "2"], "--num-items does not apply"),
        (["data.seq_len=4"], "is a path of rows, to which data.seq_len=4 does not apply"),
        (["--html", "nowhere/page.html"], "--html nowhere/page.html: cannot be written"),
    ],
)
def test_what_does_not_apply_to_rows_is_rejected(tmp_path: Path, arguments: list[str], said: str, capsys: Any) -> None:
    assert run(["inspect", str(write_rows(tmp_path / "rows.jsonl", bad=False)), *arguments]) == 2
    assert said in capsys.readouterr().err


@given(
    texts=st.lists(st.tuples(st.text(alphabet="ab \n", max_size=30), st.booleans()), max_size=5),
    width=st.integers(24, 40),
    colour=st.booleans(),
)
def test_wrapping_loses_nothing_and_stays_inside_the_bar(
    texts: list[tuple[str, bool]], width: int, colour: bool
) -> None:
    passage = Passage("caption", [(None, [Span(text, supervised=learned) for text, learned in texts])])
    shown = as_text([passage], colour=colour, width=width).split("caption\n")[1].split("\n")
    plain = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in shown]
    assert all(line.startswith(INDENT) and len(line) <= width for line in plain)
    words = "".join("".join(line.removeprefix(INDENT) for line in plain).split())
    assert re.sub("[⟦⟧]", "", words) == "".join("".join(text for text, _ in texts).split())


# -- the page ----------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """The elements of a page, with the text below each; fails where they are not nested."""

    VOID = frozenset({"meta", "link", "img", "br"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element: tuple[str, dict[str, str | None], list[str]] = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, texts in self._open:
            texts.append(data)

    def texts(self, tag: str, kind: str | None = None) -> list[str]:
        return [
            "".join(texts) for name, attrs, texts in self.elements if name == tag and kind in (None, attrs.get("class"))
        ]


def test_a_page_is_complete_escaped_and_self_contained(tmp_path: Path, capsys: Any) -> None:
    file = write_rows(tmp_path / "<i>rows.jsonl")
    assert run(["inspect", str(file), "--html", str(tmp_path / "page.html")]) == 2
    text = (tmp_path / "page.html").read_text()
    assert text.startswith("<!doctype html>\n")
    page = Page(text)
    tags = {tag for tag, _, _ in page.elements}
    assert tags.isdisjoint({"script", "img", "link", "iframe", "b", "i", "a"})
    assert not any(name in attrs for _, attrs, _ in page.elements for name in ("src", "href", "onclick"))
    assert "://" not in text.replace(str(tmp_path), "")
    assert page.texts("h1") == [str(file)]
    assert "Hi \\x1b[31m<b>" in page.texts("pre")
    assert [item.split(": ")[0] for item in page.texts("li")[1:]] == [f"{file}:{line}" for line in range(5, 11)]
    assert dict(zip(page.texts("th"), page.texts("td"), strict=False))["rows"] == "10"
    style = page.texts("style")[0]
    assert "color-scheme: light dark" in style
    assert "@media (prefers-color-scheme: dark)" in style
    policy = next(attrs["content"] for tag, attrs, _ in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def test_a_page_marks_what_is_learned_and_what_controls() -> None:
    pieces = [Span("<|user|>", control=True), Span("a & b"), Span("yes", supervised=True)]
    blocks: list[Block] = [
        Values([("rows", "1")]),
        Table("splits", ("", "training"), [("rows", "1")]),
        Passage("rows:1", [(None, [*pieces, Span("</s>", supervised=True, control=True)])]),
        Lines("1 fault", ["rows:2: is 'bad'"], "fault"),
    ]
    page = Page(block_page(title="t", blocks=blocks))
    assert page.texts("mark") == ["marked", "yes", "</s>"]
    assert page.texts("span", "control") == ["control tokens", "<|user|>", "</s>"]
    assert page.texts("pre") == ["<|user|>a & byes</s>"]
    assert [text.split("\n") for text in page.texts("section", "fault")] == [["1 fault", "rows:2: is 'bad'", ""]]
    assert page.texts("td", "number") == ["1"]


def test_shards_have_a_page_too(tmp_path: Path, capsys: Any) -> None:
    from llmtrain.data.tokenizers import train_bpe

    tokenizer = train_bpe(["a text of some words"] * 3, vocab_size=280)
    documents = [[*tokenizer.encode("some <words>"), tokenizer.eos_id]]
    eos_id = tokenizer.eos_id
    write_token_shards(tmp_path / "s", {"train": [[documents]]}, vocab_size=tokenizer.vocab_size, eos_id=eos_id)
    tokenizer.save(tmp_path / "s" / "tokenizer")
    config = write_config(tmp_path / "c.yaml", {"data": {"name": "tokens", "train": str(tmp_path / "s/train")}})
    assert run(["inspect", str(config), "--html", str(tmp_path / "page.html")]) == 0
    assert "some <words><|endoftext|>" in Page((tmp_path / "page.html").read_text()).texts("pre")
    assert run(["inspect", str(config), "--num-rows", "1"]) == 2
    assert "--num-rows does not apply" in capsys.readouterr().err
