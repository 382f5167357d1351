"""Rows for a small fine-tuning, out of the standard library's functions and their docstrings.

    files ─ scan, select (as `prepare` does) ─┬─ held out there ─▶ test.jsonl
                                              └─ the others, by another hash ─▶ dev.jsonl, train.jsonl

Three kinds of rows: a signature with a question for the names of its arguments, which a small model soon answers right;
a function's source with one for its docstring's first sentence; that sentence with one for the signature, which it
answers in the right form at best. A model that `prepare` and `train` made of the same files has seen none of the files
that the test rows are from. Sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from llmtrain.atomic import write_text
from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.prepare.documents import open_corpus
from llmtrain.data.prepare.inputs import find_inputs
from llmtrain.data.prepare.parallel import LocalExecutor, resolve_num_workers
from llmtrain.data.prepare.selection import Fate, scan, select
from llmtrain.errors import ConfigError, RunError
from llmtrain.screen import counted

OUTPUT = Path("data/functions")
SPLITS = ("test", "dev", "train")
"""Splits in the order in which they take prompts: no prompt is in two of them."""

DEV_FRACTION = 0.05
"""Share of the files that are not held out."""
MAX_ROWS = {"train": 2000, "dev": 100, "test": 100}
"""Largest number of rows of each kind."""
MAX_SOURCE_CHARACTERS = 400
MAX_SENTENCE_CHARACTERS = 120
"""Both together stay below about 200 tokens."""

_SENTENCE_END = re.compile(r"(?<=[.!?])\s")
_MARKUP = re.compile(r">>>|::|[:(,]\.?$|->")
_TEST_FOLDERS = {"test", "tests", "idle_test"}


class FunctionRow(NamedTuple):
    """A question and its answer."""

    kind: str
    """arguments, sentence or signature: what is asked for."""
    prompt: str
    completion: str

    @property
    def key(self) -> str:
        """The same for prompts that differ in blanks and capitals alone."""
        return " ".join(self.prompt.lower().split())


def main() -> int:
    """Make the rows of the files that the quickstart config prepares."""
    try:
        prepare = load_config("quickstart").config.prepare
        assert prepare is not None
        counts = function_rows(prepare, OUTPUT)
    except (ConfigError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print("\n".join(f"{OUTPUT / split}.jsonl  {counted(count, 'row')}" for split, count in counts.items()))
    return 0


def function_rows(options: PrepareConfig, output: Path, *, max_rows: Mapping[str, int] = MAX_ROWS) -> dict[str, int]:
    """Write `train.jsonl`, `dev.jsonl` and `test.jsonl` into `output`; returns how many rows each has.

    `max_rows`: of each kind, by file. The same source files give the same rows. Raises ConfigError where `options`
    names no files or holds out none, RunError where there is no function in those that it holds out.
    """
    rows: dict[str, dict[str, FunctionRow]] = {split: {} for split in SPLITS}
    for split, text in _texts(options):
        for row in rows_of_source(text):
            rows[split].setdefault(row.key, row)
    if not rows["test"]:
        raise RunError(
            f"{options.input}: there is no function in the files that val_fraction {options.val_fraction} holds out: "
            "raise it"
        )
    taken: set[str] = set()
    counts = {}
    output.mkdir(parents=True, exist_ok=True)
    for split in SPLITS:
        fresh = [row for key, row in rows[split].items() if key not in taken]
        taken.update(rows[split])
        counts[split] = _write(output / f"{split}.jsonl", _some(fresh, max_rows[split]))
    return counts


def _some(rows: list[FunctionRow], num_of_kind: int) -> Iterator[FunctionRow]:
    """So many of each kind, in an order that mixes them: by hash, so that more rows hold the fewer ones."""
    taken: Counter[str] = Counter()
    for row in sorted(rows, key=lambda row: hashlib.sha256(row.prompt.encode()).digest()):
        taken[row.kind] += 1
        if taken[row.kind] <= num_of_kind:
            yield row


def _texts(options: PrepareConfig) -> Iterator[tuple[str, str]]:
    """The split and the text of each file but tests, of equal ones the first."""
    reader = open_corpus(find_inputs(options), options)
    executor = LocalExecutor(resolve_num_workers(options.num_workers))
    corpus = select(scan(reader, options=options, executor=executor, advance=lambda _: None), options)
    stays = corpus.fates <= Fate.VAL
    for portion in corpus.portions(stays):
        for index, document in zip(portion.chosen, corpus.rereader.reread(portion), strict=True):
            if _TEST_FOLDERS & set(PurePosixPath(document.file.name).parts):
                continue
            number = portion.unit.first_document + index
            is_dev = int(corpus.hashes[number, 1]) < DEV_FRACTION * 2**64
            yield "test" if corpus.fates[number] == Fate.VAL else "dev" if is_dev else "train", document.text


def rows_of_source(text: str) -> Iterator[FunctionRow]:
    """The rows of each function in a Python file; of what is no Python of this version, none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes and comparisons in the files
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    lines = text.replace("\r\n", "\n").split("\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            head = lines[node.lineno - 1 : node.body[0].lineno - 1]
            signature = " ".join(" ".join(head).split()).replace("( ", "(").replace(" )", ")")
            if "#" in signature or not signature.endswith(":") or len(signature) > MAX_SENTENCE_CHARACTERS:
                continue  # with its body on the same line, or a comment below it
            yield FunctionRow("arguments", f"{signature}\n\n# Arguments of {node.name}:", f" {_arguments(node)}")
            sentence = first_sentence(ast.get_docstring(node) or "")
            if sentence is not None:
                yield FunctionRow("signature", f"# A function for this: {sentence}\n", signature)
                source = _source_without_docstring(node, lines)
                if source is not None:
                    yield FunctionRow("sentence", f"{source}\n\n# What {node.name} does:", f" {sentence}")


def first_sentence(docstring: str) -> str | None:
    """Return a docstring's first sentence, on one line and with a full stop; None if it is no short plain sentence."""
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = _SENTENCE_END.split(paragraph)[0]
    is_plain = sentence.isascii() and sentence[:1].isupper() and not _MARKUP.search(sentence)
    if not is_plain or len(sentence.split()) < 3 or len(sentence) > MAX_SENTENCE_CHARACTERS:
        return None
    return sentence if sentence.endswith((".", "!", "?")) else f"{sentence}."


def _arguments(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Their names, but for the object that a method belongs to."""
    given = node.args
    in_order = [*given.posonlyargs, *given.args, given.vararg, *given.kwonlyargs, given.kwarg]
    names = [one.arg for one in in_order if one is not None and one.arg not in ("self", "cls")]
    return ", ".join(names) or "none"


def _source_without_docstring(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    docstring = node.body[0]
    assert docstring.end_lineno is not None  # the parser gives it, and the other
    assert docstring.end_col_offset is not None
    if lines[docstring.end_lineno - 1].encode()[docstring.end_col_offset :].strip():
        return None  # there is more on the docstring's last line
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return _shortened(textwrap.dedent("\n".join(kept)).rstrip().split("\n"))


def _shortened(lines: Sequence[str]) -> str | None:
    """Whole lines up to MAX_SOURCE_CHARACTERS, a mark for what is left out; None where no line of the body fits."""
    kept: list[str] = []
    size = 0
    for line in lines:
        size += len(line) + 1
        if size > MAX_SOURCE_CHARACTERS:
            break
        kept.append(line)
    if len(kept) < len(lines):
        kept.append("    ...")
    return "\n".join(kept) if len(kept) > 1 else None


def _write(path: Path, rows: Iterable[FunctionRow]) -> int:
    text = "".join(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
    write_text(path, text)
    return text.count("\n")


if __name__ == "__main__":
    sys.exit(main())
