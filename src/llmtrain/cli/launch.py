"""launch: starts runs on other machines."""

from __future__ import annotations

from importlib import import_module

import typer

GROUPS = ("launch_k8s", "launch_ssh")
"""Files of this folder that hold the groups of commands."""


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the program."""
    launch = typer.Typer(help="Start runs on other machines.", rich_markup_mode=None)
    for file in GROUPS:
        import_module(f"llmtrain.cli.{file}").add_to(launch)
    app.add_typer(launch, name="launch")
