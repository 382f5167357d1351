"""inspect: the data that a run would see."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llmtrain.cli.options import ConfigOption, Json, Overrides, read_words
from llmtrain.cli.output import Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from llmtrain.cli.blocks import Block
    from llmtrain.config.load import LoadedConfig

FAULTS = 2
"""Exit code where rows have faults that would stop a run."""
Word = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG|ROWS|SHARDS",
        help="A config; rows (.jsonl, .json, .csv, .parquet, a dataset) or token shards: a file, folder or glob.",
        show_default=False,
    ),
]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("inspect")(inspect)


def inspect(
    word: Word = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    num_rows: Annotated[
        int | None, typer.Option("--num-rows", metavar="N", min=0, help="First rows to show (3).", show_default=False)
    ] = None,
    num_documents: Annotated[
        int | None,
        typer.Option(
            "--num-documents", metavar="N", min=0, help="Shards: first documents to show (3).", show_default=False
        ),
    ] = None,
    num_items: Annotated[
        int | None,
        typer.Option(
            "--num-items", metavar="N", min=0, help="Shards: first items of the run to show (2).", show_default=False
        ),
    ] = None,
    split: Annotated[
        Literal["train", "val"] | None, typer.Option("--split", help="Which of the two (train).", show_default=False)
    ] = None,
    html: Annotated[
        str | None, typer.Option("--html", metavar="FILE", help="Write it as a page too.", show_default=False)
    ] = None,
    json: Json = False,
) -> Outcome:
    """Show the data that a run would see: rows or documents, lengths, what is learned, what is cut; exit code 2 with
    every fault of the rows by file:line."""
    from llmtrain.config.errors import ConfigError

    ref, values = read_words(word, overrides, config)
    given = {"--num-rows": num_rows, "--num-documents": num_documents, "--num-items": num_items, "--split": split}
    kind = "config" if config is not None else _kind_of(str(ref))
    if kind != "config":
        if values:
            raise ConfigError(f"{ref} is a path of {kind}, to which {values[0]} does not apply; give a config for that")
        if kind == "rows":
            _refuse(given, "--num-documents", "--num-items", "--split", what=f"{ref} has rows")
            return _rows(str(ref), num_rows=3 if num_rows is None else num_rows, html=html)
        loaded = None
    else:
        from llmtrain.config.load import load_config

        loaded = load_config(str(ref), values)
        if loaded.config.data.name == "chat":
            _refuse(given, "--num-documents", "--num-items", what=f"the data of {ref} are rows")
            return _chat(loaded, num_rows=3 if num_rows is None else num_rows, split=split or "train", html=html)
    _refuse(given, "--num-rows", what=f"{ref} has documents: --num-documents")
    from llmtrain.cli.inspect_blocks import blocks_of_shards
    from llmtrain.recipes.inspect import inspect as recipe

    result = recipe(
        loaded or str(ref),
        split=split or "train",
        num_documents=3 if num_documents is None else num_documents,
        num_items=2 if num_items is None else num_items,
    )
    return _outcome(result, list(blocks_of_shards(result)), html=html)


def _rows(path: str, *, num_rows: int, html: str | None) -> Outcome:
    from llmtrain.cli.inspect_blocks import blocks_of_rows
    from llmtrain.recipes.inspection.rows import inspect_rows

    result = inspect_rows(path, num_rows=num_rows)
    return _outcome(result, list(blocks_of_rows(result)), html=html, exit_code=FAULTS if result["faults"] else 0)


def _chat(loaded: LoadedConfig, *, num_rows: int, split: Literal["train", "val"], html: str | None) -> Outcome:
    from llmtrain.cli.inspect_blocks import blocks_of_chat
    from llmtrain.config.errors import ConfigError
    from llmtrain.data.prepare.parallel import resolve_num_workers
    from llmtrain.recipes.inspection.chat import inspect_chat

    result = inspect_chat(loaded, num_rows=num_rows, num_workers=resolve_num_workers(None))
    if result[split] is None:
        raise ConfigError(f"{loaded.source} has no validation rows: name them in data.val, or set data.val_fraction")
    blocks = list(blocks_of_chat(result, split=split))
    return _outcome(result, blocks, html=html, exit_code=0 if result["would_run"] else FAULTS)


def _outcome(result: dict[str, object], blocks: Sequence[Block], *, html: str | None, exit_code: int = 0) -> Outcome:
    from llmtrain.cli.blocks import as_text, terminal_width, wants_colour

    if html is not None:
        from llmtrain.cli.page import write_page

        write_page(html, title=str(result["name"]), blocks=blocks)
    return Outcome(result, as_text(blocks, colour=wants_colour(), width=terminal_width()), exit_code)


def _kind_of(ref: str) -> Literal["config", "rows", "shards"]:
    """A config, by its name or ending; rows, by the ending or what the file holds; else token shards."""
    from llmtrain.config.load import shipped_configs

    if ref.endswith((".yaml", ".yml")) or (ref in shipped_configs() and not os.path.exists(ref)):
        return "config"
    from llmtrain.recipes.inspection.rows import holds_rows

    if holds_rows(ref):
        return "rows"
    return "config" if ref.endswith(".json") or ref in shipped_configs() else "shards"


def _refuse(given: Mapping[str, object], *names: str, what: str) -> None:
    from llmtrain.config.errors import ConfigError

    for name in names:
        if given[name] is not None:
            raise ConfigError(f"{name} does not apply: {what}")
