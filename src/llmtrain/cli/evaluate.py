"""eval: how good a model is, and whether it is better than the one before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import typer

from llmtrain.cli.blocks import Block, Figures, Lines, Table, as_text, terminal_width, wants_colour
from llmtrain.cli.options import ConfigOption, Json, Overrides
from llmtrain.cli.output import Outcome, table
from llmtrain.cli.workers import NodeRank, NumNodes, NumProcesses, Rendezvous, gang_of, run_in
from llmtrain.config.errors import ConfigError

ROWS = (
    ("model", "model"),
    ("data", "data"),
    ("tokens", "tokens"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("bits per byte", "bits_per_byte"),
    ("seconds", "seconds"),
)
MAX_NAMED = 5
"""Rows that are named of those that got worse, or were trained on; metrics.json names more."""


def add_to(app: typer.Typer) -> None:
    """Adds this file's verb to the program."""
    app.command("eval")(evaluate)


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A run, checkpoint, model or adapter folder, or owner/name; the newest run.",
            show_default=False,
        ),
    ] = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="FILE",
            help="Rows that are asked, or token shards; may be repeated. Else evaluation.data, else the run's own.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Benchmarks of lm-evaluation-harness, with commas, or YAML files of its kind; may be repeated.",
            show_default=False,
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            "--num-fewshot", metavar="N", min=0, help="Examples before a task's questions.", show_default=False
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            "--baseline",
            metavar="MODEL",
            help="Compare with it row by row; or last-published. Else, of a tuned model, the one that it was tuned "
            "from.",
            show_default=False,
        ),
    ] = None,
    no_baseline: Annotated[bool, typer.Option("--no-baseline", help="Compare with none.")] = False,
    max_samples: Annotated[
        int | None,
        typer.Option("--max-samples", metavar="N", min=1, help="The first rows of each file.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", metavar="N", min=1, help="The longest answer.", show_default=False),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            min=0.0,
            help="0, the default, takes the likeliest token each time.",
            show_default=False,
        ),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", metavar="P", min=0.0, max=1.0, help="Sample from the likeliest of mass P.", show_default=False
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Take a prompt as a user's turn; the default is how the model was tuned.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size", metavar="N", min=1, help="Rows at a time; the results stay the same.", show_default=False
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", metavar="N", min=1, help="Of token shards, so many batches.", show_default=False),
    ] = None,
    root_dir: Annotated[
        str | None, typer.Option("--root-dir", metavar="DIR", help="Folder of all runs.", show_default=False)
    ] = None,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    json: Json = False,
) -> Outcome:
    """Measure a model: its loss, its answers to rows, and whether they are better than another model's."""
    from llmtrain.config.overrides import looks_like_override

    values = list(overrides or [])
    if model is not None and looks_like_override(model):
        values.insert(0, model)
        model = None
    if baseline is not None and no_baseline:
        raise ConfigError("--baseline names a model to compare with, and --no-baseline wants none: leave one out")
    given = {
        "data": data,
        "tasks": [name for names in tasks for name in names.split(",") if name] if tasks else None,
        "num_fewshot": num_fewshot,
        "baseline": baseline,
        "max_samples": max_samples,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "chat": chat,
        "batch_size": batch_size,
    }
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if no_baseline:
        settings["baseline"] = None
    gang = gang_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous)
    if gang:
        words = [model] if model is not None else []
        options = {**settings, "config": config, "steps": steps, "root_dir": root_dir}
        return run_in(gang, ["eval", *words, *values, *_options(options)], as_json=json)
    from llmtrain.recipes.evaluate import evaluate as recipe

    result = recipe(model, config=config, overrides=values, settings=settings, steps=steps, root_dir=root_dir)
    if "tasks" in result:
        return Outcome(result, as_text(list(_tasks(result)), colour=wants_colour(), width=terminal_width()))
    if "scores" not in result:
        return Outcome(result, table(result, ROWS))
    return Outcome(result, as_text(list(_blocks(result)), colour=wants_colour(), width=terminal_width()))


def _options(given: Mapping[str, Any]) -> Iterator[str]:
    """The options once more, for the processes that are started."""
    if "baseline" in given and given["baseline"] is None:
        yield "--no-baseline"
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{name}"
        elif value is not None:
            yield from (f"{flag}={one}" for one in (value if isinstance(value, list) else [value]))


def _blocks(result: Mapping[str, Any]) -> Iterator[Block]:
    """What an evaluation of rows came to."""
    about = [("model", str(result["model"]))]
    if result["baseline"]:
        about.append(("baseline", str(result["baseline"])))
    yield Figures([*about, ("report", f"{result['output']}/report.html")])
    parts = {**result["files"], "all": result} if len(result["files"]) > 1 else {"all": result}
    yield Table(
        "scores",
        ["", *(parts if len(parts) > 1 else [result["data"]])],
        [
            ["rows", *(f"{part['rows']:,}" for part in parts.values())],
            *([name, *(_number(part["scores"][name]) for part in parts.values())] for name in result["scores"]),
        ],
    )
    if result["comparison"]:
        yield Table(
            "against the baseline",
            ["", "baseline", "model", "difference", "95 % interval", "better", "worse", "same", ""],
            [_compared(name, found) for name, found in result["comparison"].items()],
        )
        yield from _got_worse(result["got_worse"])
    yield from _notes(result)


def _tasks(result: Mapping[str, Any]) -> Iterator[Block]:
    """What the benchmarks came to."""
    yield Figures([("model", str(result["model"])), ("metrics", f"{result['output']}/metrics.json")])
    rows = []
    for name, found in result["tasks"].items():
        scores = found["scores"]
        for metric in (one for one in scores if "_stderr" not in one):
            base, _, kind = metric.partition(",")
            error = scores.get(f"{base}_stderr{',' if kind else ''}{kind}")
            shots = "" if found["num_fewshot"] is None else str(found["num_fewshot"])
            rows.append([name, metric, _number(scores[metric]), _number(error), shots, f"{found['rows'] or ''}"])
    yield Table("tasks", ["", "metric", "score", "± standard error", "few-shot", "rows"], rows)


def _compared(name: str, found: Mapping[str, Any]) -> list[str]:
    interval = f"{_number(found['low'], sign=True)} … {_number(found['high'], sign=True)}"
    difference = _number(found["difference"], sign=True)
    rows = [f"{found[kind]:,}" for kind in ("wins", "losses", "ties")]
    return [name, _number(found["base"]), _number(found["tuned"]), difference, interval, *rows, found["verdict"]]


def _got_worse(got_worse: Mapping[str, list[str]]) -> Iterator[Block]:
    lines = [
        f"{name}: {', '.join(rows[:MAX_NAMED])}{' …' if len(rows) > MAX_NAMED else ''}"
        for name, rows in got_worse.items()
        if rows
    ]
    if lines:
        yield Lines("rows that got worse, the worst first", lines)


def _notes(result: Mapping[str, Any]) -> Iterator[Block]:
    lines = []
    if result["prompts_too_long"]:
        lines.append(f"{result['prompts_too_long']:,} prompts leave no room in the context: their answers are empty")
    if result["rows_without_loss"]:
        lines.append(f"{result['rows_without_loss']:,} rows are longer than the context: they have no loss")
    if result["empty_predictions"]:
        lines.append(f"{result['empty_predictions']:,} answers are empty; they count as any other")
    if lines:
        yield Lines("notes", lines, "warning")
    contamination = result["contamination"]
    if not contamination["checked"]:
        yield Lines("contamination", [f"not looked for: {contamination['why']}"])
    elif contamination["rows"]:
        named = contamination["named"]
        more = f"and {len(named) - MAX_NAMED:,} more" if len(named) > MAX_NAMED else ""
        yield Lines(
            "rows that stand among the training rows", [*named[:MAX_NAMED], *([more] if more else [])], "warning"
        )
        if contamination["scores_without"]:
            yield Table(
                "scores with and without them",
                ["", "all rows", "without them"],
                [
                    [name, _number(value), _number(contamination["scores_without"][name])]
                    for name, value in contamination["scores_with"].items()
                ],
            )


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign and value else f"{value:.4g}"
