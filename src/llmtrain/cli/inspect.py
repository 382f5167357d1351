"""inspect: shows the data that a run would read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtrain.cli.options import ConfigOption, Json, Overrides, local, read_config_or_run
from llmtrain.cli.output import Outcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from llmtrain.reports.blocks import Block
    from llmtrain.verbs.inspect import Inspection

FAULTS = 2
"""Exit code for rows with faults that would stop a run."""
Word = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG|RUN|ROWS|SHARDS",
        help="A config, a run; a file, folder or glob of rows (.jsonl, .json, .csv, .parquet, dataset); token shards.",
    ),
]


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("inspect")(inspect)


def inspect(
    word: Word = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    num_rows: Annotated[
        int | None, typer.Option("--num-rows", metavar="N", min=0, help="Show the first N rows (3).")
    ] = None,
    num_documents: Annotated[
        int | None,
        typer.Option("--num-documents", metavar="N", min=0, help="Show the first N documents of shards (3)."),
    ] = None,
    num_items: Annotated[
        int | None,
        typer.Option("--num-items", metavar="N", min=0, help="Show the first N sequences of a run on shards (2)."),
    ] = None,
    split: Annotated[
        Literal["train", "val"] | None, typer.Option("--split", help="Training or validation data (train).")
    ] = None,
    html: Annotated[
        str | None,
        typer.Option("--html", metavar="FILE", callback=local, help="Also write the report as an HTML page."),
    ] = None,
    json: Json = False,
) -> Outcome:
    """Show the data that a run would read.

    It shows rows or documents, their lengths, the tokens that the loss counts, and how many are cut off. For rows with
    faults the exit code is 2, and each fault has its file:line.
    """
    from llmtrain.verbs.inspect import inspect as verb

    ref, values = read_config_or_run(word, overrides, config)
    found = verb(
        ref,
        values,
        is_config=config is not None,
        split=split,
        num_rows=num_rows,
        num_documents=num_documents,
        num_items=num_items,
    )
    blocks = list(_blocks_of(found, split=split or "train"))
    if html is not None:
        _write_page(html, title=str(found.report["name"]), blocks=blocks)
    return Outcome(found.report, blocks, FAULTS if found.has_faults else 0)


def _write_page(path: str, *, title: str, blocks: Sequence[Block]) -> None:
    from pathlib import Path

    from llmtrain.atomic import write_text
    from llmtrain.errors import ConfigError
    from llmtrain.reports.block_page import block_page

    try:
        write_text(Path(path), block_page(title=title, blocks=blocks))
    except OSError as error:
        raise ConfigError(f"--html {path}: cannot be written ({error.strerror or error})") from error


def _blocks_of(found: Inspection, *, split: str) -> Iterable[Block]:
    from llmtrain.cli.inspect_blocks import blocks_of_chat, blocks_of_rows, blocks_of_shards

    if found.kind == "chat":
        return blocks_of_chat(found.report, split=split)
    return blocks_of_rows(found.report) if found.kind == "rows" else blocks_of_shards(found.report)
