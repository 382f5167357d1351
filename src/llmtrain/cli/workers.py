"""Options of commands that run in several processes (--nproc and others), and the start of these processes."""

from __future__ import annotations

from collections.abc import Sequence
from json import JSONDecoder
from typing import Annotated, Any

import typer

from llmtrain.cli.output import Outcome
from llmtrain.distributed.launch import WorkerGroup, launch
from llmtrain.errors import ConfigError, Hang, Preempted, RunError, WillFailAgain, WorkersFailed

NumProcesses = Annotated[
    int | None,
    typer.Option("--nproc", metavar="N", min=1, help="Start N processes on this machine, through torchrun."),
]
NumNodes = Annotated[
    int, typer.Option("--nnodes", metavar="N", min=1, help="Number of machines, with --nproc processes each.")
]
NodeRank = Annotated[
    int | None,
    typer.Option(
        "--node-rank",
        metavar="I",
        min=0,
        help="Number of this machine, from 0; the machines agree on it when not given.",
    ),
]
Rendezvous = Annotated[
    str | None,
    typer.Option("--rendezvous", metavar="HOST:PORT", help="Address of the first machine; MASTER_ADDR when not given."),
]
MaxRestarts = Annotated[
    int,
    typer.Option(
        "--max-restarts", metavar="N", min=0, help="Start all processes again when one fails, at most N times."
    ),
]


def worker_group_of(
    nproc: int | None, *, nnodes: int, node_rank: int | None, rendezvous: str | None, max_restarts: int = 0
) -> WorkerGroup | None:
    """Return the processes to start, or None to run in this process. Raises ConfigError if --nproc is missing."""
    if nproc is not None:
        return WorkerGroup(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous, max_restarts=max_restarts)
    if nnodes > 1 or node_rank is not None or rendezvous is not None or max_restarts:
        raise ConfigError(
            "--nnodes, --node-rank, --rendezvous and --max-restarts need --nproc N, which starts the processes"
        )
    return None


def run_in(group: WorkerGroup, arguments: Sequence[str], *, as_json: bool) -> Outcome:
    """Run a command line in the worker group and return its result, which rank 0 prints. Raises WorkersFailed."""
    code, output = launch(group, [*arguments, *(["--json"] if as_json else [])], capture=as_json)
    return outcome_of(code, output, as_json=as_json)


def outcome_of(code: int, output: str, *, as_json: bool) -> Outcome:
    """Return the result from the output of the processes. Raises WorkersFailed if they failed."""
    document = _last_document(output) if as_json else {}
    if code:
        error = document.get("error", {})
        message = error.get("message", f"the processes ended with exit code {code}; their messages are above")
        kinds = {kind.exit_code: kind.kind for kind in (ConfigError, WillFailAgain, Preempted, Hang)}
        raise WorkersFailed(message, exit_code=code, kind=error.get("kind", kinds.get(code, RunError.kind)))
    return Outcome(document, "" if as_json else output.rstrip("\n"))


def _last_document(output: str) -> dict[str, Any]:
    """Return the last JSON document of the output. Rank 0 prints one at each start."""
    document: dict[str, Any] = {}
    rest = output.strip()
    while rest:
        document, end = JSONDecoder().raw_decode(rest)
        rest = rest[end:].lstrip()
    return document
