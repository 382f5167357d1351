"""Writes train, dev, test and adversarial rows about the language: `python -m examples.dsl.generate --output data/dsl`.

    questions by number and seed ─ a prompt that was there before is left out ─ hash of the prompt ─▶ its file

The hash of a prompt decides its file, so no prompt can be in two of them, whatever the numbers of rows. Traps are in
train.jsonl too; those whose hash is held out are adversarial.jsonl, and dev and test hold none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path

from examples.dsl.questions import PLAIN, TRAPS, Question

COUNTS = {"train": 4000, "dev": 200, "test": 400, "adversarial": 200}
TRAPS_IN_TRAIN = 0.25
HELD_OUT = 0.3
"""Share of all prompts that may not be trained on."""

SYSTEM = (
    "You answer questions about a spreadsheet language with two functions. "
    "FLOWROLL(LineItem, PeriodCount, BACKWARD|FORWARD) sums a window of periods. "
    "DIMMATCH(SourceValue, SourceDimension, TargetDimension) looks a value up in another dimension."
)


def normalised(prompt: str) -> str:
    """The same for prompts that differ in capitals and blanks alone."""
    return " ".join(prompt.lower().split())


def split_of(question: Question, *, is_trap: bool) -> str:
    """The file that a question belongs to, by the hash of its prompt."""
    share = int.from_bytes(hashlib.sha256(normalised(question.prompt).encode()).digest()[:8]) / 2**64
    if share >= HELD_OUT:
        return "train"
    return "adversarial" if is_trap else "dev" if share < HELD_OUT / 3 else "test"


def generate(counts: dict[str, int], *, seed: int) -> dict[str, list[Question]]:
    """As many questions as wanted for each file; the kinds take turns.

    More of them begin with the same: a file of 100 is the beginning of the file of 1,000 with the same seed.
    """
    num_traps = round(counts["train"] * TRAPS_IN_TRAIN)
    plain = {"train": counts["train"] - num_traps, "dev": counts["dev"], "test": counts["test"]}
    traps = {"train": num_traps, "adversarial": counts["adversarial"]}
    files: dict[str, list[Question]] = {name: [] for name in counts}
    for wanted, is_trap in ((plain, False), (traps, True)):
        found: dict[str, list[Question]] = {name: [] for name in wanted}
        for question in _questions(seed, is_trap=is_trap):
            into = found[split_of(question, is_trap=is_trap)]
            if len(into) < wanted[split_of(question, is_trap=is_trap)]:
                into.append(question)
            if all(len(found[name]) == count for name, count in wanted.items()):
                break
        for name, questions in found.items():
            files[name] += questions
    random.Random(f"{seed} order").shuffle(files["train"])
    return files


def _questions(seed: int, *, is_trap: bool) -> Iterator[Question]:
    """Questions without end, no prompt twice."""
    makers = TRAPS if is_trap else PLAIN
    seen: set[str] = set()
    number = 0
    while True:
        question = makers[number % len(makers)](random.Random(f"{seed} {is_trap} {number}"))
        number += 1
        key = normalised(question.prompt)
        if key not in seen:
            seen.add(key)
            yield question


def row_of(question: Question, *, shape: str) -> dict[str, object]:
    """The question as a row: a conversation, or a prompt with its completion."""
    if shape == "completion":
        return {"prompt": f"{question.prompt}\n", "completion": question.answer, "kind": question.kind}
    messages = [("system", SYSTEM), ("user", question.prompt), ("assistant", question.answer)]
    return {"messages": [{"role": role, "content": text} for role, text in messages], "kind": question.kind}


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("data/dsl"))
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--shape", choices=["messages", "completion"], default="messages")
    for name, count in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=count, metavar="N", help=f"rows (default {count})")
    given = parser.parse_args()
    files = generate({name: getattr(given, name) for name in COUNTS}, seed=given.seed)
    given.output.mkdir(parents=True, exist_ok=True)
    for name, questions in files.items():
        rows = (json.dumps(row_of(question, shape=given.shape), ensure_ascii=False) for question in questions)
        (given.output / f"{name}.jsonl").write_text("".join(f"{row}\n" for row in rows), "utf-8")
        print(f"{given.output / name}.jsonl  {len(questions):,} rows")


if __name__ == "__main__":
    main()
