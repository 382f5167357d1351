"""plan: predicts parameters, memory and time of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.inspect_blocks import changes_lines, mixture_table
from llmtrain.cli.options import ConfigOption, ConfigWord, Json, Overrides, read_config_or_run
from llmtrain.cli.output import Outcome, gigabytes
from llmtrain.reports.blocks import Block, Lines, Table
from llmtrain.screen import counted


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("plan")(plan)


def plan(
    word: ConfigWord = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    device: Annotated[
        str, typer.Option("--device", metavar="NAME", help="Plan for this machine (this), cpu, or a GPU such as h100.")
    ] = "this",
    nproc: Annotated[
        int | None, typer.Option("--nproc", metavar="N", min=1, help="Number of processes, each on a device.")
    ] = None,
    json: Json = False,
) -> Outcome:
    """Predict the memory and time of a run, without running it.

    Also its parameters, FLOPs, steps and tokens. It needs no GPU.
    """
    from llmtrain.config.loading.load import load_config

    ref, values = read_config_or_run(word, overrides, config)
    loaded = load_config(ref, values)
    from llmtrain.verbs.plan import plan as plan_run

    document = {"config": loaded.source, **plan_run(loaded.config, device=device, num_ranks=nproc)}
    return Outcome(document, list(_blocks(document)))


def _blocks(document: Mapping[str, Any]) -> Iterator[Block]:
    parameters, run, layout, memory = (document[key] for key in ("parameters", "run", "layout", "memory"))
    of_parts = {name: n for name, n in parameters.items() if name not in ("total", "trainable", "non_embedding")}
    compiled = "compiled" if layout["compile"] else "not compiled"
    yield Lines(f"{document['config']}: {layout['precision']}, {compiled}", ())
    rows = [[_words(name), f"{n:,}", f"{n / parameters['total']:.1%}"] for name, n in of_parts.items()]
    rows += [[_words(name), f"{parameters[name]:,}", ""] for name in ("total", "trainable", "non_embedding")]
    yield Table("parameters", ["", "", ""], rows)
    about_run = [
        ("steps", _count(run["steps"])),
        ("tokens a step", _count(run["tokens_per_step"])),
        ("tokens", _count(run["tokens"])),
        *([("supervised", f"{run['supervised_share']:.1%}")] if run["supervised_share"] is not None else []),
        ("epochs", "not known" if run["epochs"] is None else f"{run['epochs']:.3g}"),
        ("FLOPs a token", f"{document['flops_per_token']:.4g}"),
        ("FLOPs", "not known" if document["flops"] is None else f"{document['flops']:.4g}"),
    ]
    yield Table("run", ["", ""], about_run)
    if mixture := document["mixture"]:
        yield mixture_table("the mixture of the run", mixture["sources"])
        if mixture["changes"]:
            yield changes_lines(mixture["changes"])
    rows = [[_words(part), gigabytes(size)] for part, size in memory["parts"].items() if size]
    of_each = "each process" if layout["ranks"] > 1 else "the process"
    yield Table(f"peak memory of {of_each}", ["", ""], [*rows, ["all", gigabytes(memory["peak_bytes"])]])
    share = " that each has" if layout["ranks"] > 1 else ""
    fits = "fits into" if memory["fits"] else "does NOT fit into"
    yield Lines(f"{fits} the {gigabytes(memory['device_bytes'])} of {document['time']['device']}{share}", ())
    lines = [
        f"{counted(layout['ranks'], 'process')} ({layout['strategy']}) × "
        f"{counted(layout['grad_accum_steps'], 'micro-batch')} of {layout['micro_batch_size']} × "
        f"{counted(layout['seq_len'], 'token')} "
        f"= {counted(layout['batch_size'], 'sequence')} a step"
    ]
    if layout["recomputed_blocks"]:
        lines.append(
            f"{layout['recomputed_blocks']} of {counted(layout['num_blocks'], 'block')} recomputed in the backward pass"
        )
    if layout["because"] and layout["ranks"] > 1:
        lines.append(f"{layout['strategy']}: {layout['because']}")
    if layout["reduce_each_micro_batch"]:
        lines.append("gradients are summed over the processes after each micro-batch, since full ones do not fit")
    if layout["tensor_parallel"] > 1:
        lines.append(f"{layout['tensor_parallel']} processes share each matrix")
    if layout["replicas"] > 1:
        ranks = counted(layout["ranks"] // layout["replicas"], "process")
        lines.append(f"{layout['replicas']} replicas, each sharded over {ranks}")
    yield Lines("layout", lines)
    speed, seconds = document["time"]["tokens_per_sec"], document["time"]["seconds"]
    if speed is not None:
        how_long = "" if seconds is None else f"{_duration(seconds)} "
        yield Lines(f"time on {document['time']['device']}", [f"{how_long}at {speed:,.0f} tokens/s"])
    if document["assumed"]:
        yield Lines("assumed", document["assumed"])


def _words(name: str) -> str:
    return name.replace("_", " ")


def _count(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h" if seconds < 72 * 3600 else f"{seconds / 86400:,.1f} days"
