"""convert: turns rows of other formats into JSONL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, named_values
from llmtrain.reports.blocks import Block, Lines, Table
from llmtrain.screen import counted

SHOWN_SKIPS = 20
ROWS = (
    ("output", "output"),
    ("rows", "rows"),
    ("copied as they were", "copied"),
    ("converted", "converted"),
    ("skipped", "skipped"),
)
COLUMN = "NAME"


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("convert")(convert)


def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="IN",
            help="Files (.json, .jsonl, .csv, .tsv, .parquet; also .gz), ChatGPT's .zip, folders, globs, or a "
            "dataset on the Hub (owner/name).",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A .jsonl file, or a folder that gets a file for each input.", show_default=False
        ),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt-column", metavar=COLUMN, help="Column of the prompt.")] = None,
    completion: Annotated[
        str | None, typer.Option("--completion-column", metavar=COLUMN, help="Column of the completion.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system-column", metavar=COLUMN, help="Column of the system prompt.")
    ] = None,
    text: Annotated[
        str | None, typer.Option("--text-column", metavar=COLUMN, help="Column of text that is learned in full.")
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option("--messages-column", metavar=COLUMN, help="Column of conversations, as lists of turns."),
    ] = None,
    as_messages: Annotated[
        bool, typer.Option("--as-messages", help="Turn prompts and completions into conversations.")
    ] = False,
    split: Annotated[
        str | None, typer.Option("--split", metavar="NAME", help="Split of a dataset: train[:1%].")
    ] = None,
    subset: Annotated[
        str | None, typer.Option("--subset", metavar="NAME", help="Configuration of a dataset that has several.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    json: Json = False,
) -> Outcome:
    """Convert chats, tables and datasets to JSONL rows.

    It reads exports of ChatGPT, ShareGPT, JSON, CSV, Parquet and Hugging Face datasets.
    """
    from llmtrain.data.convert.columns import Columns
    from llmtrain.errors import ConfigError
    from llmtrain.verbs.convert import convert as convert_rows

    named = Columns(prompt=prompt, completion=completion, system=system, text=text, messages=messages)
    if len({"text", "messages", "prompt"} & set(named.given)) > 1:
        raise ConfigError("give one of --prompt-column, --text-column and --messages-column: a row has one shape")
    result = convert_rows(paths, out, columns=named, as_messages=as_messages, split=split, subset=subset, force=force)
    return Outcome(result, list(_blocks(result)))


def _blocks(result: Mapping[str, Any]) -> Iterator[Block]:
    yield named_values(result, ROWS)
    if result["outputs"][0]["name"]:
        yield Table("files", ("", "rows"), [(one["name"], f"{one['rows']:,}") for one in result["outputs"]])
    for title, counts in (("shapes", result["shapes"]), ("turns left out of conversations", result["left_out"])):
        if counts:
            yield Table(title, ("", ""), [(name, f"{count:,}") for name, count in counts.items()])
    if result["unused"]:
        found = [(name, f"{one['rows']:,}", one["first"]) for name, one in result["unused"].items()]
        yield Table("left out of rows", ("", "rows", "the first"), found)
    for name, splits in result["other_splits"].items():
        yield Lines(
            f"{name} is one split; {', '.join(splits)} of the same dataset {'is' if len(splits) == 1 else 'are'} left "
            "out: name a split with --split",
            (),
        )
    if result["joined"]:
        yield Lines(
            f"prompt and completion are joined unchanged; {counted(result['joined'], 'pair has', 'pairs have')} no "
            "space or line break "
            "between the two: --as-messages turns them into conversations, for the chat template",
            (),
        )
    if result["skipped"]:
        lines = [f"{skip['source']}: {skip['reason']}" for skip in result["skips"][:SHOWN_SKIPS]]
        if result["skipped"] > SHOWN_SKIPS:
            lines.append(f"… and {result['skipped'] - SHOWN_SKIPS:,} more (--json names the first 1,000)")
        yield Lines(f"skipped {result['skipped']:,}", lines)
