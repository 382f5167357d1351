"""convert: rows of other formats in, JSONL out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, columns, table

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
    """Adds this file's verb to the program."""
    app.command("convert")(convert)


def convert(
    paths: Annotated[
        list[str],
        typer.Argument(
            metavar="IN",
            help="Files (.json, .jsonl, .csv, .tsv, .parquet; .gz), ChatGPT's .zip, folders, globs, or a dataset of "
            "the Hub (owner/name).",
            show_default=False,
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(
            metavar="OUT", help="A .jsonl file, or a folder: each input becomes a file there.", show_default=False
        ),
    ],
    prompt: Annotated[str | None, typer.Option("--prompt-column", metavar=COLUMN, help="Holds the question.")] = None,
    completion: Annotated[
        str | None, typer.Option("--completion-column", metavar=COLUMN, help="Holds the answer.")
    ] = None,
    system: Annotated[str | None, typer.Option("--system-column", metavar=COLUMN, help="Holds system text.")] = None,
    text: Annotated[
        str | None, typer.Option("--text-column", metavar=COLUMN, help="Holds text to learn whole.")
    ] = None,
    messages: Annotated[
        str | None, typer.Option("--messages-column", metavar=COLUMN, help="Holds a list of turns.")
    ] = None,
    as_messages: Annotated[
        bool, typer.Option("--as-messages", help="Make conversations of prompts and completions.")
    ] = False,
    split: Annotated[str | None, typer.Option("--split", metavar="NAME", help="Of a dataset: train[:1%].")] = None,
    subset: Annotated[
        str | None, typer.Option("--subset", metavar="NAME", help="Of a dataset that has several.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.")] = False,
    json: Json = False,
) -> Outcome:
    """Make JSONL rows of ChatGPT exports, ShareGPT, JSON, CSV, Parquet and Hugging Face datasets."""
    from llmtrain.config.errors import ConfigError
    from llmtrain.data.convert.columns import Columns
    from llmtrain.recipes.convert import convert as recipe

    named = Columns(prompt=prompt, completion=completion, system=system, text=text, messages=messages)
    if len({"text", "messages", "prompt"} & set(named.given)) > 1:
        raise ConfigError("give one of --prompt-column, --text-column and --messages-column: a row has one shape")
    result = recipe(paths, out, columns=named, as_messages=as_messages, split=split, subset=subset, force=force)
    return Outcome(result, "\n".join(_lines(result)))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield table(result, ROWS)
    if result["outputs"][0]["name"]:
        yield "\nfiles"
        rows = [(one["name"], f"{one['rows']:,}") for one in result["outputs"]]
        yield from columns(("", "rows"), rows)
    for title, counts in (("shapes", result["shapes"]), ("turns left out of conversations", result["left_out"])):
        if counts:
            yield f"\n{title}"
            yield from columns(("", ""), [(name, f"{count:,}") for name, count in counts.items()], with_head=False)
    if result["joined"]:
        yield (
            f"\nprompt and completion are put together as they are; {result['joined']:,} have nothing between the two: "
            "--as-messages makes conversations of them, for the chat template"
        )
    if result["skipped"]:
        yield f"\nskipped {result['skipped']:,}"
        yield from (f"  {skip['source']}: {skip['reason']}" for skip in result["skips"][:SHOWN_SKIPS])
        if result["skipped"] > SHOWN_SKIPS:
            yield f"  … and {result['skipped'] - SHOWN_SKIPS:,} more (--json names the first 1,000)"
