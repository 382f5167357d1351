"""train: trains a model, in a new run or a resumed one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.importing import large_imports
from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words, readable
from llmtrain.cli.output import Outcome, named_values
from llmtrain.cli.workers import MaxRestarts, NodeRank, NumNodes, NumProcesses, Rendezvous, run_in, worker_group_of
from llmtrain.errors import ConfigError
from llmtrain.reports.blocks import Lines
from llmtrain.screen import counted

if TYPE_CHECKING:
    from llmtrain.config.sections.schema import Config

AUTO = "auto"
ROWS = (
    ("run", "run"),
    ("in the store", "address"),
    ("model", "model"),
    ("report", "report"),
    ("published", "published"),
    ("steps", "steps"),
    ("tokens", "tokens"),
    ("first loss", "first_loss"),
    ("last loss", "last_loss"),
    ("validation loss", "val_loss"),
    ("best validation loss", "best_val_loss"),
    ("validation perplexity", "val_perplexity"),
    ("validation bits per byte", "val_bits_per_byte"),
    ("tokens/s", "tokens_per_sec"),
    ("seconds", "seconds"),
)


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("train")(train)


def train(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="[RUN]",
            callback=readable,
            help="Continue a run: its id, its folder or address, or one of its checkpoints; the newest run when none "
            "is named. auto: continue the run output.run_id if it exists, else start it.",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Compute five forward steps, and write no run.")] = False,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> Outcome:
    """Train a model, or continue a run.

    Missing token shards are made first, where the config says how. Without CONFIG, --resume uses the run's own config.
    """
    from llmtrain.config.loading.load import load_config

    ref, values = read_words(word, overrides, config, required=resume is None)
    loaded = load_config(ref, values, say=nproc is None) if ref is not None else None
    if nproc is not None and loaded is not None:
        from llmtrain.distributed.rendezvous import first_machine
        from llmtrain.distributed.strategy import reject_what_cannot_run

        reject_what_cannot_run(loaded.config, world_size=nproc * nnodes)
        rendezvous = first_machine(loaded.config.distributed.rendezvous, option=rendezvous)
    group = worker_group_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous, max_restarts=max_restarts)
    if group:
        taken = None
        if max_restarts and resume is None and loaded is not None and not dry_run:
            # Restarted processes continue the run of the first ones, so its id is made before these start.
            resume, taken = AUTO, _take_folder(loaded.config, nnodes=nnodes, node_rank=node_rank)
            values = [*values, f"output.run_id={taken.name}"]
        options = [f"--resume={resume}"] if resume is not None else []
        options += ["--dry-run"] if dry_run else []
        if loaded is not None:
            _say(loaded.config, f"starting {counted(group.nproc, 'process')}")
        with _removed_if_empty(taken):
            return run_in(group, ["train", *([ref] if ref else []), *values, *options], as_json=json)
    if loaded is not None:
        from llmtrain.cli.config import model_in_words

        _say(loaded.config, f"starting {loaded.source}: {model_in_words(loaded.config.model)}")
    with large_imports():
        from llmtrain.verbs.train import train as train_model

    result = train_model(loaded, resume=resume, overrides=values, dry_run=dry_run)
    return Outcome(result, [_dry_run(result) if dry_run else named_values(result, ROWS)])


def _say(config: Config, message: str) -> None:
    """Log a line before torch is imported, which takes seconds without any output."""
    from llmtrain.tracking.logs import setup_logging

    setup_logging(config.logging, run_folder=None, rank=int(os.environ.get("RANK", "0")))
    logging.getLogger("llmtrain.train").info(message)


@contextmanager
def _removed_if_empty(folder: Path | None) -> Iterator[None]:
    """Remove a folder after the block if no run began in it."""
    try:
        yield
    finally:
        if folder is not None:
            with suppress(OSError):  # it is not empty
                folder.rmdir()


def _take_folder(config: Config, *, nnodes: int, node_rank: int | None) -> Path:
    """Return the folder of a new run; the first machine makes it, so that no other start takes its id.

    Raises ConfigError if there is a run of that id, or if several machines would each make an id of their own.
    """
    from llmtrain.runs.folders import create_run, make_run
    from llmtrain.runs.stores import runs_folder

    root, run_id = runs_folder(config.output.root_dir), config.output.run_id
    if run_id is None and nnodes > 1:
        raise ConfigError("--max-restarts on several machines needs output.run_id: the run's name, the same on all")
    if run_id is None:
        return make_run(config.run, root)
    return create_run(root, run_id) if node_rank in (None, 0) else root / run_id


def _dry_run(result: Mapping[str, Any]) -> Lines:
    losses = [f"{loss:.4g}" for loss in result["losses"]]
    planned = result["planned_steps"]
    text = (
        f"dry run: {len(losses)} forward steps, losses {', '.join(losses)}; a run would take {counted(planned, 'step')}"
    )
    return Lines(text, ())
