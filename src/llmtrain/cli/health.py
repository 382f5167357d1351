"""health: a probe of a run, for pods."""

from __future__ import annotations

from typing import Annotated

import typer

from llmtrain.cli.options import Json, RootDir, local
from llmtrain.cli.output import Outcome
from llmtrain.errors import ConfigError


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("health")(health)


def health(
    run: Annotated[
        str,
        typer.Argument(metavar="RUN", callback=local, help="The run: its id or its folder; the newest when not given."),
    ] = "latest",
    started: Annotated[bool, typer.Option("--started", help="Does the run train since this container began?")] = False,
    progress: Annotated[bool, typer.Option("--progress", help="Has the run done something lately?")] = False,
    max_age: Annotated[
        float | None,
        typer.Option(
            "--max-age",
            metavar="SEC",
            min=1,
            help="With --progress: how old its last sign may be; 3 × distributed.timeout_sec when not given.",
        ),
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Answer a probe: exit code 0 for yes, 1 for no.

    It reads the run's folder, so every machine that sees the folder gives the same answer.
    """
    if started == progress:
        raise ConfigError("health answers one question: give either --started or --progress")
    if started and max_age is not None:
        raise ConfigError("--max-age is for --progress: remove it")
    from llmtrain.verbs.health import health as examine

    found = examine(run, root_dir=root_dir, started=started, max_age_sec=max_age)
    return Outcome(found, found["why"], exit_code=0 if found["healthy"] else 1)
