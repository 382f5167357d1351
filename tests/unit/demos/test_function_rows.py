"""Rows of functions and docstrings: right, short, and with test rows from the files that the base model never saw."""

from __future__ import annotations

import ast
import hashlib
import json
import sysconfig
from collections import Counter
from pathlib import Path

import pytest

from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.chat.shapes import PromptCompletion, example_of
from llmtrain.demos.function_rows import FunctionRow, first_sentence, function_rows, rows_of_source
from llmtrain.errors import RunError

SOURCE = '''\
class Shelf:
    async def take(
        self, name, *, default=None
    ):
        """Take a book from the shelf.
        It is gone then.
        """
        # a comment
        return self.books.pop(name, default)

    def only_a_docstring(self):
        """Say nothing at all"""

    def on_one_line(self): """This is left out here."""

    def more(self):
        """This source is left out."""; return 1

    def short(self):
        """Too short."""
        return 1

    def long(self, first, /, *args, key=(1, 2), **options):
        return 2
'''


def test_a_function_gives_its_arguments_its_signature_and_its_source() -> None:
    signature = "async def take(self, name, *, default=None):"
    source = "async def take(\n    self, name, *, default=None\n):\n    # a comment\n"
    source += "    return self.books.pop(name, default)\n\n# What take does:"
    rows = list(rows_of_source(SOURCE))
    assert rows[:3] == [
        FunctionRow("arguments", f"{signature}\n\n# Arguments of take:", " name, default"),
        FunctionRow("signature", "# A function for this: Take a book from the shelf.\n", signature),
        FunctionRow("sentence", source, " Take a book from the shelf."),
    ]
    assert [(row.kind, row.completion) for row in rows[3:]] == [
        ("arguments", " none"),
        ("signature", "def only_a_docstring(self):"),
        ("arguments", " none"),
        ("signature", "def more(self):"),
        ("arguments", " none"),
        ("arguments", " first, args, key, options"),
    ]
    assert list(rows_of_source("def broken(:")) == []
    assert list(rows_of_source("\0")) == []


@pytest.mark.parametrize(
    ("docstring", "sentence"),
    [
        ("Return the name.  Or not.", "Return the name."),
        ("Return the name\n    of it.\n\nMore.", "Return the name of it."),
        ("Is this one? Yes.", "Is this one?"),
        ("Use as follows:", None),
        ("f(x) -> y", None),
        (">>> Return the name", None),
        ("lower case at first.", None),
        ("Zwei Wörter und mehr.", None),
        ("Two words.", None),
        ("Word " * 40, None),
        ("", None),
    ],
)
def test_only_short_plain_sentences_are_asked_for(docstring: str, sentence: str | None) -> None:
    assert first_sentence(docstring) == sentence


def test_a_long_function_is_cut_at_a_line() -> None:
    body = "".join(f"    value = value + {number}\n" for number in range(100))
    *_, row = rows_of_source(f'def add(value):\n    """Add many numbers up."""\n{body}')
    assert row.kind == "sentence"
    assert len(row.prompt) < 450
    assert row.prompt.endswith("\n    ...\n\n# What add does:")
    ast.parse(row.prompt)


@pytest.fixture
def options(tmp_path: Path) -> PrepareConfig:
    (tmp_path / "lib/test").mkdir(parents=True)
    for number in range(60):
        text = f'def f_{number}(x):\n    """Return the number {number}."""\n    return {number}\n'
        copied = 'def copied():\n    """Stand in all of the files."""\n    return 0\n'
        (tmp_path / f"lib/m_{number}.py").write_text(text + copied)
    (tmp_path / "lib/test/test_m.py").write_text('def test():\n    """Never see this here."""\n    return 1\n')
    return PrepareConfig(input=str(tmp_path / "lib"), output=str(tmp_path / "out"), val_fraction=0.2)


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_test_rows_are_from_the_files_that_prepare_holds_out(options: PrepareConfig, tmp_path: Path) -> None:
    counts = function_rows(options, tmp_path / "rows")
    held_out = set()
    for file in (tmp_path / "lib").glob("*.py"):
        if int.from_bytes(hashlib.sha256(file.read_bytes()).digest()[:8]) < 0.2 * 2**64:
            held_out.add(int(file.stem.removeprefix("m_")))
    rows = {split: read(tmp_path / "rows" / f"{split}.jsonl") for split in ("train", "dev", "test")}
    numbers = {
        split: {int(row["completion"].split()[-1].strip(".")) for row in of if " the number " in row["completion"]}
        for split, of in rows.items()
    }
    assert numbers["test"] == held_out
    assert numbers["train"] | numbers["dev"] == set(range(60)) - held_out
    assert numbers["dev"]
    assert not numbers["train"] & numbers["dev"]
    assert counts == {split: len(of) for split, of in rows.items()}
    assert sum(counts.values()) == 3 * 60 + 3, "what stands in all of the files is asked once"
    assert "Never see this" not in str(rows)


def test_rows_are_the_same_each_time_and_no_more_than_wanted(options: PrepareConfig, tmp_path: Path) -> None:
    function_rows(options, tmp_path / "a")
    assert function_rows(options, tmp_path / "b", max_rows={"train": 10, "dev": 1, "test": 2}) == {
        "train": 30,
        "dev": 3,
        "test": 6,
    }
    whole, some = (read(tmp_path / name / "train.jsonl") for name in "ab")
    assert [row for row in whole if row in some] == some
    assert Counter(row["kind"] for row in some) == {"arguments": 10, "sentence": 10, "signature": 10}
    function_rows(options, tmp_path / "b")
    assert read(tmp_path / "b/train.jsonl") == whole


def test_held_out_files_without_functions_are_said(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"m_{number}.py").write_text(f"x = {number}\n")
    options = PrepareConfig(input=str(tmp_path), output=str(tmp_path / "out"), val_fraction=0.5)
    with pytest.raises(RunError, match=r"there is no function in the files that val_fraction 0\.5 holds out"):
        function_rows(options, tmp_path / "rows")


@pytest.mark.slow
def test_the_standard_library_gives_thousands_of_short_rows_that_share_no_prompt(tmp_path: Path) -> None:
    options = PrepareConfig(
        input=sysconfig.get_path("stdlib"),
        include=["*.py"],
        exclude=["site-packages", "dist-packages", "__pycache__"],
        output=str(tmp_path / "out"),
        val_fraction=0.02,
        on_error="skip",
    )
    counts = function_rows(options, tmp_path / "rows")
    assert counts["train"] == 6000
    assert counts["dev"] == 300
    assert counts["test"] >= 100
    keys: list[str] = []
    for split in counts:
        for row in read(tmp_path / "rows" / f"{split}.jsonl"):
            assert isinstance(example_of(row), PromptCompletion)
            assert len(row["prompt"]) + len(row["completion"]) < 700
            keys.append(" ".join(row["prompt"].lower().split()))
    assert len(keys) == len(set(keys))
