"""plan, doctor: what a run would need, and what this machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_words
from llmtrain.cli.output import Outcome, columns


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("plan")(plan)


def plan(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="What to plan for: this, cpu, or a GPU such as h100.")
    ] = "this",
    nproc: Annotated[
        int | None, typer.Option("--nproc", metavar="N", min=1, help="Processes, one a device.", show_default=False)
    ] = None,
    json: Json = False,
) -> Outcome:
    """Work out parameters, FLOPs, steps, tokens, memory and time of a run; needs no GPU."""
    from llmtrain.config.load import load_config

    ref, values = read_words(word, overrides, config)
    loaded = load_config(str(ref), values)
    from llmtrain.recipes.plan import plan as recipe

    document = {"config": loaded.source, **recipe(loaded.config, device=device, num_ranks=nproc)}
    return Outcome(document, _plan_text(document))


def _plan_text(document: Mapping[str, Any]) -> str:
    parameters, run, layout, memory = (document[key] for key in ("parameters", "run", "layout", "memory"))
    of_parts = {name: n for name, n in parameters.items() if name not in ("total", "trainable", "non_embedding")}
    lines = [f"{document['config']}: {layout['precision']}, {'compiled' if layout['compile'] else 'not compiled'}"]
    lines += ["", "parameters"]
    rows = [[_words(name), f"{n:,}", f"{n / parameters['total']:.1%}"] for name, n in of_parts.items()]
    rows += [[_words(name), f"{parameters[name]:,}", ""] for name in ("total", "trainable", "non_embedding")]
    lines += columns(["", "", ""], rows, with_head=False)
    lines += ["", "run"]
    epochs = None if run["epochs"] is None else f"{run['epochs']:.3g}"
    figures = [
        ("steps", _count(run["steps"])),
        ("tokens a step", _count(run["tokens_per_step"])),
        ("tokens", _count(run["tokens"])),
        ("epochs", epochs or "not known"),
        ("FLOPs a token", f"{document['flops_per_token']:.4g}"),
        ("FLOPs", "not known" if document["flops"] is None else f"{document['flops']:.4g}"),
    ]
    lines += columns(["", ""], [list(row) for row in figures], with_head=False)
    lines += ["", f"peak memory of {'each process' if layout['ranks'] > 1 else 'the process'}"]
    rows = [[_words(part), _size(size)] for part, size in memory["parts"].items() if size]
    lines += columns(["", ""], [*rows, ["all", _size(memory["peak_bytes"])]], with_head=False)
    fits = "fits into" if memory["fits"] else "does NOT fit into"
    lines.append(f"  {fits} the {_size(memory['device_bytes'])} of {document['time']['device']}")
    lines += ["", "layout"]
    lines.append(
        f"  {layout['ranks']} {'process' if layout['ranks'] == 1 else 'processes'} ({layout['strategy']}) × "
        f"{layout['grad_accum_steps']} micro-batches of {layout['micro_batch_size']} × {layout['seq_len']} tokens "
        f"= {layout['batch_size']} sequences a step"
    )
    speed, seconds = document["time"]["tokens_per_sec"], document["time"]["seconds"]
    if speed is not None:
        how_long = "" if seconds is None else f"{_duration(seconds)} "
        lines += ["", f"time on {document['time']['device']}", f"  {how_long}at {speed:,.0f} tokens/s"]
    if document["assumed"]:
        lines += ["", "assumed", *(f"  {each}" for each in document["assumed"])]
    return "\n".join(lines)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e10 else f"{num_bytes / 1e9:.3f} GB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
