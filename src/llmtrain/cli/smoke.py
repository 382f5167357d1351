"""smoke: whether training in several processes works on this machine."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome
from llmtrain.cli.workers import NodeRank, NumNodes, NumProcesses, Rendezvous, gang_of, run_in
from llmtrain.config.errors import RunError


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("smoke")(smoke)


def smoke(
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=2, help="Passes over the samples.")] = 2,
    batch_size: Annotated[int, typer.Option("--batch-size", metavar="N", min=1, help="On each process.")] = 256,
    samples: Annotated[int, typer.Option("--samples", metavar="N", min=1, help="Points that are made up.")] = 4096,
    features: Annotated[int, typer.Option("--features", metavar="N", min=1, help="Width of a point.")] = 128,
    classes: Annotated[int, typer.Option("--classes", metavar="N", min=2, help="Classes of points.")] = 4,
    lr: Annotated[float, typer.Option("--lr", metavar="X", min=0.0, help="AdamW's learning rate.")] = 3e-3,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Of points and weights.")] = 42,
    device: Annotated[str, typer.Option("--device", metavar="NAME", help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    json: Json = False,
) -> Outcome:
    """Check devices, collectives and gradients with a small model, on one process or several."""
    gang = gang_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)
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
    if gang:
        return run_in(gang, ["smoke", *(f"--{name}={value}" for name, value in options.items())], as_json=json)
    from llmtrain.recipes.smoke import smoke as recipe

    result = recipe(**{name.replace("-", "_"): value for name, value in options.items()})  # type: ignore[arg-type]
    checks = [(rank["rank"], name, passed) for rank in result["ranks"] for name, passed in rank["checks"].items()]
    failed = [f"{name} on rank {rank}" for rank, name, passed in checks if not passed]
    if failed:
        print(_table(result), file=sys.stderr)
        raise RunError(f"the smoke test failed: {', '.join(failed)}")
    return Outcome(result, _table(result))


def _table(result: Mapping[str, Any]) -> str:
    """A line a rank."""
    checks = list(result["ranks"][0]["checks"])
    rows = [["rank", "host", "device", "loss first", "last", "seconds", *checks]]
    for rank in result["ranks"]:
        figures = [f"{rank['first_loss']:.4f}", f"{rank['last_loss']:.4f}", f"{rank['seconds']:.2f}"]
        passed = ["ok" if rank["checks"][name] else "FAILED" for name in checks]
        rows.append([str(rank["rank"]), rank["host"], rank["device"], *figures, *passed])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
