"""Blocks that show what quality steps did, for `prepare` and `inspect`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llmtrain.cli.output import show
from llmtrain.reports.blocks import Block, Passage, Span, Table


def steps_table(steps: Sequence[Mapping[str, Any]]) -> Table:
    """Return a table with a row for each step, and below it one for each rule that left documents out."""
    rows = []
    for step in steps:
        left_out = sum(rule["documents"] for rule in step["dropped"].values())
        rows.append((step["name"], *map(show, (step["documents"], step["bytes"], step["altered"], left_out))))
        rows += [(f"  {name}", "", "", "", show(rule["documents"])) for name, rule in step["dropped"].items()]
    head = ("quality step", "documents in", "bytes in", "altered", "left out")
    return Table("", head, rows, dispensable=("bytes in", "altered"))


def quality_blocks(quality: Sequence[Mapping[str, Any]], *, shown: int = 300) -> Iterator[Block]:
    """Yield the table of the steps that made some shards, and the first document that each rule left out."""
    for of_folder in quality:
        if of_folder["steps"]:
            yield steps_table(of_folder["steps"])
        named: set[tuple[int, str]] = set()
        for one in of_folder["left_out"]:
            if (rule := (one["step"], one["rule"])) not in named:
                named.add(rule)
                repeats = f", repeats {one['repeats']}" if "repeats" in one else ""
                caption = f"left out by {one['name']} ({one['rule']}): {one['source']}{repeats}"
                yield Passage(caption, [(None, [Span(one["text"][:shown])])])
