"""Numbers and their nouns agree in every message: one helper makes them, and no message makes its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import llmtrain
from llmtrain.screen import counted

SOURCE = Path(llmtrain.__file__).parent
NOUNS = (
    *("rows", "documents", "files", "samples", "texts", "turns", "prompts", "questions", "processes", "checkpoints"),
    *("sequences", "pairs", "columns", "layers", "faults", "shards", "fields", "warnings", "items"),
)
BLANK_AND_NOUN = tuple(f" {noun}" for noun in NOUNS)
ALWAYS_SEVERAL = {
    "cli/plan.py": "processes share each matrix",
    "config/sections/training.py": "processes",
    "data/prepare/inputs.py": "files are not read",  # after a suffix
    "data/tokens.py": "processes read: they share",
    "demos/finetune.py": "questions about",
    "distributed/peers.py": "processes did not meet",
    "distributed/rendezvous.py": "processes have to meet",
    "distributed/resolve.py": "processes were started",
    "distributed/strategy.py": "processes were requested",
    "models/huggingface/model.py": "documents in one row",
    "publishing/graph.py": "rows in one batch",
    "training/session.py": "sequences a batch",  # of all ranks
    "verbs/smoke.py": "samples are fewer",
}
"""Beginnings of texts after a number that is never 1, or after no number, by their file."""


@pytest.mark.parametrize(
    ("number", "nouns", "text"),
    [
        (0, ["row"], "0 rows"),
        (1, ["row"], "1 row"),
        (2000, ["process"], "2,000 processes"),
        (1, ["batch"], "1 batch"),
        (3, ["batch"], "3 batches"),
        (1, ["row is", "rows are"], "1 row is"),
        (2, ["row is", "rows are"], "2 rows are"),
    ],
)
def test_a_number_and_its_noun_agree(number: int, nouns: list[str], text: str) -> None:
    assert counted(number, *nouns) == text


def plurals_after_numbers() -> Iterator[tuple[str, str]]:
    """Yield the file and the text of each plural that follows a value directly, in f-strings and in log messages."""
    for path in sorted(SOURCE.rglob("*.py")):
        name = path.relative_to(SOURCE).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                for value, after in zip(node.values, node.values[1:], strict=False):
                    text = str(after.value) if isinstance(after, ast.Constant) else ""
                    if isinstance(value, ast.FormattedValue) and text.startswith(BLANK_AND_NOUN):
                        yield name, text.strip()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                for noun in NOUNS:
                    for sign in ("%d", "%s"):
                        if f"{sign} {noun} " in f"{node.value} ":
                            yield name, node.value.partition(f"{sign} ")[2]


def test_no_message_makes_its_own_plural() -> None:
    found = [
        (name, text)
        for name, text in plurals_after_numbers()
        if name not in ALWAYS_SEVERAL or not text.startswith(ALWAYS_SEVERAL[name])
    ]
    assert found == []
