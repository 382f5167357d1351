"""--nproc and its company: a verb that runs in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from json import loads
from typing import Annotated

import typer

from llmtrain.cli.output import Outcome
from llmtrain.config.errors import ConfigError, RunError, WorkersFailed
from llmtrain.distributed.launch import Gang, launch

NumProcesses = Annotated[
    int | None,
    typer.Option("--nproc", metavar="N", min=1, help="Start so many processes on this machine, by torchrun."),
]
NumNodes = Annotated[int, typer.Option("--nnodes", metavar="N", min=1, help="Machines; with --nproc on each.")]
NodeRank = Annotated[
    int | None, typer.Option("--node-rank", metavar="I", min=0, help="This machine's number; agreed on when not given.")
]
Rendezvous = Annotated[
    str | None, typer.Option("--rendezvous", metavar="HOST:PORT", help="The first machine; MASTER_ADDR when not given.")
]


def gang_of(nproc: int | None, *, nnodes: int, node_rank: int | None, rendezvous: str | None) -> Gang | None:
    """The processes that were asked for, or None for this one alone. Raises ConfigError for half a wish."""
    if nproc is not None:
        return Gang(nproc=nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)
    if nnodes > 1 or node_rank is not None or rendezvous is not None:
        raise ConfigError("--nnodes, --node-rank and --rendezvous go with --nproc N, which starts the processes")
    return None


def run_in(gang: Gang, arguments: Sequence[str], *, as_json: bool) -> Outcome:
    """Run a command line in the gang; its first process prints what this one would. Raises WorkersFailed."""
    code, output = launch(gang, [*arguments, *(["--json"] if as_json else [])], capture=as_json)
    document = loads(output) if output.strip() else {}
    if code:
        error = document.get("error", {})
        message = error.get("message", f"the processes ended with {code}; what they said stands above")
        raise WorkersFailed(message, exit_code=code, kind=error.get("kind", RunError.kind))
    return Outcome(document, "")
