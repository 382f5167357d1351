"""prepare: turns text into token shards, and rows into tokenised rows in the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, named_values

if TYPE_CHECKING:
    from llmtrain.reports.blocks import Block

ROWS = (
    ("shards", "output"),
    ("cache", "cache"),
    ("documents", "documents"),
    ("training documents", "train_documents"),
    ("validation documents", "val_documents"),
    ("rejected", "rejected"),
    ("rows", "rows"),
    ("samples", "samples"),
    ("tokens", "tokens"),
    ("training tokens", "train_tokens"),
    ("validation tokens", "val_tokens"),
    ("learned", "supervised_tokens"),
    ("vocabulary", "vocab_size"),
    ("made now", "made_now"),
    ("seconds", "seconds"),
)
"""Counts of text and of rows; a result has only some of them."""


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("prepare")(prepare)


def prepare(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    engine: Annotated[
        Literal["local", "ray"],
        typer.Option("--engine", help="Where text is prepared: on this machine, or on a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="The Ray cluster, or auto for the one of this machine. Default: RAY_ADDRESS, or one of its own.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> Outcome:
    """Make token shards from text, or tokenise rows.

    The config names the text or the rows. Tokenised rows go into the cache.
    """
    if address is not None and engine != "ray":
        raise typer.BadParameter("it goes with --engine ray", param_hint="--address")
    from llmtrain.config.loading.load import load_config
    from llmtrain.data.prepare.parallel import resolve_num_workers
    from llmtrain.verbs.prepare import prepare as verb

    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    result = verb(loaded, num_workers=resolve_num_workers(None), engine=engine, address=address)
    return Outcome(result, [named_values(result, ROWS), *_steps(result)])


def _steps(result: dict[str, Any]) -> list[Block]:
    """Return what the quality steps did to text, and where examples of what they left out are."""
    from llmtrain.cli.step_blocks import steps_table
    from llmtrain.reports.blocks import Lines

    steps = result.get("steps")
    if not steps:
        return []
    dropped = result["dropped"]
    return [steps_table(steps), *([Lines("", [f"examples of what was left out: {dropped}"])] if dropped else [])]
