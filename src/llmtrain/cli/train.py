"""train: the main job, new or resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, table
from llmtrain.cli.workers import MaxRestarts, NodeRank, NumNodes, NumProcesses, Rendezvous, gang_of, run_in
from llmtrain.config.errors import ConfigError

if TYPE_CHECKING:
    from llmtrain.config.schema import Config

NEWEST = "latest"
AUTO = "auto"
ROWS = (
    ("run", "run"),
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
    """Adds this file's verb to the program."""
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
            help="Go on with a run: its id, its folder or one of its checkpoints; the newest run when none is named; "
            "auto: output.run_id if it was started already, else start it.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Five forward steps; no run is written.")] = False,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    max_restarts: MaxRestarts = 0,
    json: Json = False,
) -> Outcome:
    """Train a model, from its start or resumed.

    Shards that are missing are made first, where the config says how. With --resume and no CONFIG, the run's own
    config is used.
    """
    from llmtrain.config.load import load_config

    ref, values = read_words(word, overrides, config, required=resume is None)
    loaded = load_config(ref, values) if ref is not None else None
    if nproc is not None and loaded is not None:
        from llmtrain.distributed.asked import address_of, refuse_what_cannot_run

        refuse_what_cannot_run(loaded.config, world_size=nproc * nnodes)
        rendezvous = address_of(loaded.config.distributed.rendezvous, given=rendezvous)
    gang = gang_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous, max_restarts=max_restarts)
    if gang:
        if max_restarts and resume is None and loaded is not None and not dry_run:
            # Started again, the processes go on with the run that the first ones began; so its name is made here.
            resume, output = AUTO, loaded.config.output
            if output.run_id is None:
                values = [*values, f"output.run_id={_new_run_id(loaded.config)}"]
            elif (Path(output.root_dir) / output.run_id).exists():
                raise ConfigError(f"the run {output.run_id} exists already: go on with it by --resume {AUTO}")
        options = [f"--resume={resume}"] if resume is not None else []
        options += ["--dry-run"] if dry_run else []
        return run_in(gang, ["train", *([ref] if ref else []), *values, *options], as_json=json)
    from llmtrain.recipes.train import train as recipe

    result = recipe(loaded, resume=resume, overrides=values, dry_run=dry_run)
    return Outcome(result, _dry_run(result) if dry_run else table(result, ROWS))


def _new_run_id(config: Config) -> str:
    from llmtrain.training.runs import make_run_id

    return make_run_id(config.run)


def _dry_run(result: Mapping[str, Any]) -> str:
    losses = [f"{loss:.4g}" for loss in result["losses"]]
    planned = result["planned_steps"]
    return f"dry run: {len(losses)} forward steps, losses {', '.join(losses)}; a run would take {planned} steps"


def name_resume(argv: Sequence[str]) -> list[str]:
    """Gives a bare `train --resume` the value `latest`, since Typer knows no option whose value may be left out.

    The word after --resume is its value unless it starts with a dash, is key=value, or ends as a config file does.
    """
    words = list(argv)
    if words[:1] != ["train"]:
        return words
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else "-"
        if word == "--resume" and (following.startswith("-") or _is_config_or_override(following)):
            words[index] = f"--resume={NEWEST}"
    return words


def _is_config_or_override(word: str) -> bool:
    from llmtrain.config.overrides import looks_like_override

    return looks_like_override(word) or word.endswith((".yaml", ".yml", ".json"))
