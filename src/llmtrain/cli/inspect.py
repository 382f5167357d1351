"""inspect: the data that a run would see."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import typer

from llmtrain.cli.options import ConfigOption, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, columns, table

BAR_WIDTH = 40
INDENT = "    │ "
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
Word = Annotated[
    str | None,
    typer.Argument(
        metavar="CONFIG|SHARDS",
        help="A config, or token shards: a folder, a .parquet file, or a glob.",
        show_default=False,
    ),
]
ROWS = (
    ("data", "data"),
    ("split", "split"),
    ("tokenizer", "tokenizer"),
    ("end token", "end_token"),
    ("documents", "documents"),
    ("tokens", "tokens"),
    ("bytes a token", "bytes_per_token"),
    ("vocabulary", "vocab_size"),
    ("tokens that occur", "tokens_that_occur"),
)


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("inspect")(inspect)


def inspect(
    word: Word = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    num_documents: Annotated[
        int, typer.Option("--num-documents", metavar="N", min=0, help="First documents to show.")
    ] = 3,
    num_items: Annotated[
        int, typer.Option("--num-items", metavar="N", min=0, help="First items of the run to show.")
    ] = 2,
    split: Annotated[Literal["train", "val"], typer.Option("--split", help="Which of the two.")] = "train",
    json: Json = False,
) -> Outcome:
    """Show the data that a run would see: documents, lengths, sources, items, and what windows cut."""
    from llmtrain.config.errors import ConfigError
    from llmtrain.config.load import load_config, shipped_configs

    ref, values = read_words(word, overrides, config)
    is_config = config is not None or str(ref) in shipped_configs() or str(ref).endswith((".yaml", ".yml", ".json"))
    if not is_config and values:
        raise ConfigError(f"{ref} is a path of shards, to which {values[0]} does not apply; give a config for that")
    wanted = load_config(str(ref), values) if is_config else str(ref)
    from llmtrain.recipes.inspect import inspect as recipe

    result = recipe(wanted, split=split, num_documents=num_documents, num_items=num_items)
    return Outcome(result, "\n".join(_lines(result)))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield table(result, ROWS)
    if result["row_groups_read"] < result["row_groups"]:
        yield (
            f"\nwhat follows is from {result['row_groups_read']} of {result['row_groups']:,} row groups, evenly spaced"
        )
    yield from (f"\nfault: {fault}" for fault in result["faults"])
    yield from _lengths(result["lengths"])
    yield "\nsources"
    rows = [(row["source"], f"{row['documents']:,}", f"{row['tokens']:,}", row["share"]) for row in result["sources"]]
    yield from columns(("", "documents", "tokens", "share"), [(*row[:3], f"{row[3]:.1%}") for row in rows])
    if result["mixture"]:
        yield "\nmixture"
        yield from columns(
            ("", "tokens", "share of items", "passes an epoch"),
            [
                (row["path"], f"{row['tokens']:,}", f"{row['share']:.2%}", f"{row['passes_an_epoch']:.3g}")
                for row in result["mixture"]
            ],
        )
    if result["windows"]:
        yield from _windows(result["windows"])
    for number, document in enumerate(result["first_documents"]):
        yield f"\ndocument {number}: {document['source']}, {document['tokens']:,} tokens"
        yield _indented(document["text"])
    for item in result["items"]:
        yield from _item(item)


def _lengths(lengths: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\nlengths in tokens: shortest {lengths['shortest']:,}, median {lengths['median']:,}, mean "
        f"{lengths['mean']:,.0f}, 90 % up to {lengths['p90']:,}, 99 % up to {lengths['p99']:,}, "
        f"longest {lengths['longest']:,}"
    )
    bins = lengths["histogram"]
    most = max((row["documents"] for row in bins), default=0)
    labels = [f"{row['from']:,}–{row['to']:,}" for row in bins]
    width = max(map(len, labels), default=0)
    for label, row in zip(labels, bins, strict=True):
        bar = "█" * -(-row["documents"] * BAR_WIDTH // max(1, most))
        yield f"  {label:>{width}}  {row['documents']:>9,}  {bar}"


def _windows(windows: Mapping[str, Any]) -> Iterator[str]:
    apart = "cannot attend to each other" if windows["documents_apart"] else "can attend to each other"
    yield f"\nwindows: {windows['items']:,} items of {windows['seq_len']:,} tokens; documents in one {apart}"
    yield (
        f"  {windows['documents_cut']:,} documents ({windows['share_cut']:.1%}) are cut by a window's end; no token is "
        f"left out, {windows['padding']:,} positions are padding"
    )


def _item(item: Mapping[str, Any]) -> Iterator[str]:
    padding = f", {item['padding']:,} of padding" if item["padding"] else ""
    yield (
        f"\nitem {item['item']:,}: window {item['window']:,} of source {item['source']}, epoch {item['epoch']}, "
        f"{item['supervised_tokens']:,} tokens to predict{padding}"
    )
    for piece in item["documents"]:
        begins = "goes on" if piece["begins_before"] else "begins"
        ends = "ends" if piece["ends"] else "is cut"
        yield f"  ── a document {begins} and {ends}, {piece['tokens']:,} tokens"
        yield _indented(piece["text"])


def _indented(text: str) -> str:
    """Lines behind a bar. What a terminal would obey (escape sequences, carriage returns) is written out."""
    shown = CONTROL.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return "\n".join(INDENT + line for line in shown.split("\n"))
