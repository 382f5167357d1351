"""--nproc and its company: a verb that runs in several processes."""

from __future__ import annotations

from collections.abc import Sequence
from json import JSONDecoder
from typing import Annotated, Any

import typer

from llmtrain.cli.output import Outcome
from llmtrain.config.errors import ConfigError, Hang, Preempted, RunError, WillFailAgain, WorkersFailed
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
MaxRestarts = Annotated[
    int, typer.Option("--max-restarts", metavar="N", min=0, help="Start all again, as often, when a process fails.")
]


def gang_of(
    nproc: int | None, *, nnodes: int, node_rank: int | None, rendezvous: str | None, max_restarts: int = 0
) -> Gang | None:
    """The processes that were asked for, or None for this one alone. Raises ConfigError for half a wish."""
    if nproc is not None:
        return Gang(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous, max_restarts=max_restarts)
    if nnodes > 1 or node_rank is not None or rendezvous is not None or max_restarts:
        raise ConfigError(
            "--nnodes, --node-rank, --rendezvous and --max-restarts go with --nproc N, which starts the processes"
        )
    return None


def run_in(gang: Gang, arguments: Sequence[str], *, as_json: bool) -> Outcome:
    """Run a command line in the gang; its first process prints what this one would. Raises WorkersFailed."""
    code, output = launch(gang, [*arguments, *(["--json"] if as_json else [])], capture=as_json)
    document = _last_document(output)
    if code:
        error = document.get("error", {})
        message = error.get("message", f"the processes ended with {code}; what they said stands above")
        kinds = {kind.exit_code: kind.kind for kind in (ConfigError, WillFailAgain, Preempted, Hang)}
        raise WorkersFailed(message, exit_code=code, kind=error.get("kind", kinds.get(code, RunError.kind)))
    return Outcome(document, "")


def _last_document(output: str) -> dict[str, Any]:
    """The last of the JSON documents that the starts of the first process printed, one each."""
    document: dict[str, Any] = {}
    rest = output.strip()
    while rest:
        document, end = JSONDecoder().raw_decode(rest)
        rest = rest[end:].lstrip()
    return document
