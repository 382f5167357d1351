"""smoke: tests training in several processes on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Device, Json
from llmtrain.cli.output import Outcome, printable
from llmtrain.cli.workers import NodeRank, NumNodes, NumProcesses, Rendezvous, run_in, worker_group_of
from llmtrain.errors import RunError
from llmtrain.reports.blocks import Table


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("smoke")(smoke)


def smoke(
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=2, help="Passes over the samples.")] = 2,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=1, help="Samples of one step in each process.")
    ] = 256,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Number of synthetic samples.")] = 4096,
    features: Annotated[int, typer.Option("--features", metavar="N", min=1, help="Features of a sample.")] = 128,
    classes: Annotated[int, typer.Option("--classes", metavar="N", min=2, help="Classes of the samples.")] = 4,
    lr: Annotated[float, typer.Option("--lr", metavar="X", min=0.0, help="Learning rate of AdamW.")] = 3e-3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of samples and weights.")] = 42,
    device: Device = "auto",
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    json: Json = False,
) -> Outcome:
    """Test training in one process or several with a small model.

    It checks devices, collectives and gradients.
    """
    group = worker_group_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)
    options = {
        "epochs": epochs,
        "batch-size": batch_size,
        "samples": samples,
        "features": features,
        "classes": classes,
        "lr": lr,
        "seed": seed,
        "device": device,
    }
    if group:
        return run_in(group, ["smoke", *(f"--{name}={value}" for name, value in options.items())], as_json=json)
    from llmtrain.verbs.smoke import smoke as run_test

    result = run_test(**{name.replace("-", "_"): value for name, value in options.items()})  # type: ignore[arg-type]
    checks = [(rank["rank"], name, passed) for rank in result["ranks"] for name, passed in rank["checks"].items()]
    failed = [f"{name} on rank {rank}" for rank, name, passed in checks if not passed]
    if failed:
        print(printable([_table(result)], stream=2), file=sys.stderr)
        raise RunError(f"the smoke test failed: {', '.join(failed)}")
    return Outcome(result, [_table(result)])


def _table(result: Mapping[str, Any]) -> Table:
    """Return a table with one row for each rank."""
    checks = list(result["ranks"][0]["checks"])
    rows = []
    for rank in result["ranks"]:
        measured = [f"{rank['first_loss']:.4f}", f"{rank['last_loss']:.4f}", f"{rank['seconds']:.2f}"]
        passed = ["ok" if rank["checks"][name] else "FAILED" for name in checks]
        rows.append([str(rank["rank"]), rank["host"], rank["device"], *measured, *passed])
    head = ["rank", "host", "runs_on", "first_loss", "last_loss", "seconds"]
    return Table("", [*head, *checks], rows)
