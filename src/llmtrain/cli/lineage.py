"""lineage: shows where a model came from, as text, as JSON and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Annotated, Any, Final

import typer

from llmtrain.cli.options import Json, Model, RootDir, local
from llmtrain.cli.output import Outcome
from llmtrain.screen import counted, known_width

WIDTH: Final = 80
"""Width in columns if that of the terminal is not known."""


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("lineage")(lineage)


def lineage(
    model: Model,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every file with its recorded hash; exit code 1 if one differs.")
    ] = False,
    picture: Annotated[
        str | None,
        typer.Option("--picture", metavar="FILE", callback=local, help="Draw the lineage into this SVG file too."),
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Show where a model came from.

    It names run, commit, config, base model, tokenizer and data, with the hashes of all files.
    """
    from llmtrain.verbs.lineage import lineage as trace

    found = trace(model, root_dir=root_dir, check=verify, picture=picture)
    lines = list(_lines(found["lineage"]))
    if verify:
        differences = counted(len(found["problems"]), "difference")
        lines += ["", "everything is as it was" if found["unchanged"] else f"{differences}: see the lines with ✗"]
    return Outcome(found, "\n".join(lines), exit_code=1 if found["unchanged"] is False else 0)


def _lines(node: Mapping[str, Any], *, first: str = "", rest: str = "") -> Iterator[str]:
    yield f"{first}{node['kind']}: {node['name']}"
    children = node["made_from"]
    bar = "│  " if children else "   "
    for text in [
        *(f"{label} {value}" for label, value in node["facts"].items()),
        *(f"✗ {p}" for p in node["problems"]),
    ]:
        yield from wrap(
            text,
            known_width(1) or WIDTH,
            initial_indent=rest + bar,
            subsequent_indent=f"{rest}{bar}  ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    for number, child in enumerate(children):
        is_last = number == len(children) - 1
        yield from _lines(child, first=rest + ("└─ " if is_last else "├─ "), rest=rest + ("   " if is_last else "│  "))
