"""eval: measures a model, and compares it with another."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from llmtrain.cli.importing import large_imports
from llmtrain.cli.options import Chat, ConfigOption, Json, Overrides, TrustRemoteCode, local, readable, stored
from llmtrain.cli.output import Outcome, named_values
from llmtrain.cli.workers import NodeRank, NumNodes, NumProcesses, Rendezvous, run_in, worker_group_of
from llmtrain.errors import ConfigError
from llmtrain.reports.blocks import Block, Lines, Table, Values
from llmtrain.screen import counted

ROWS = (
    ("model", "model"),
    ("precision", "precision"),
    ("data", "data"),
    ("tokens", "tokens"),
    ("loss", "loss"),
    ("perplexity", "perplexity"),
    ("bits per byte", "bits_per_byte"),
    ("seconds", "seconds"),
)
MAX_NAMED = 5
"""Largest number of rows that are listed as worse, or as trained on; metrics.json lists more."""


Model = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        callback=readable,
        help="A run, a checkpoint, a model or adapter folder or its address, or owner/name on the Hub; the newest run "
        "when not given.",
    ),
]
Data = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        metavar="FILE",
        help="Rows that the model answers, or token shards; may be repeated. evaluation.data when not given, else the "
        "data of the run.",
    ),
]
Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--tasks",
        metavar="NAMES",
        callback=local,
        help="Benchmarks of lm-evaluation-harness, separated by commas, or YAML files like its; may be repeated.",
    ),
]
NumFewshot = Annotated[
    int | None,
    typer.Option("--num-fewshot", metavar="N", min=0, help="Examples before each question of a benchmark."),
]
Baseline = Annotated[
    str | None,
    typer.Option(
        "--baseline",
        metavar="MODEL",
        callback=readable,
        help="Model to compare with, row by row, or last-published. The one that MODEL was tuned from when not given.",
    ),
]
NoBaseline = Annotated[bool, typer.Option("--no-baseline", help="Compare with no other model.")]
MaxSamples = Annotated[
    int | None, typer.Option("--max-samples", metavar="N", min=1, help="Use only the first N rows of each file.")
]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
]
Temperature = Annotated[
    float | None,
    typer.Option("--temperature", metavar="T", min=0.0, help="0, the default, takes the likeliest token each time."),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p", metavar="P", min=0.0, max=1.0, help="Sample from the likeliest tokens of total probability P."
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option("--batch-size", metavar="N", min=1, help="Rows at a time; the results do not depend on it."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", min=1, help="Evaluate only N batches, of token shards.")
]
RootDir = Annotated[
    str | None,
    typer.Option("--root-dir", metavar="DIR", callback=stored, help="Folder of all runs, or its address."),
]


def add_to(app: typer.Typer) -> None:
    """Add the command of this file to the program."""
    app.command("eval")(evaluate)


def evaluate(
    model: Model = None,
    overrides: Overrides = None,
    config: ConfigOption = None,
    data: Data = None,
    tasks: Tasks = None,
    num_fewshot: NumFewshot = None,
    baseline: Baseline = None,
    no_baseline: NoBaseline = False,
    max_samples: MaxSamples = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    chat: Chat = None,
    batch_size: BatchSize = None,
    steps: Steps = None,
    root_dir: RootDir = None,
    trust_remote_code: TrustRemoteCode = False,
    nproc: NumProcesses = None,
    nnodes: NumNodes = 1,
    node_rank: NodeRank = None,
    rendezvous: Rendezvous = None,
    json: Json = False,
) -> Outcome:
    """Evaluate a model, and compare it with another.

    It measures the loss, metrics of the answers to rows, or standard benchmarks.
    """
    model, values = _model_and_overrides(model, overrides)
    if baseline is not None and no_baseline:
        raise ConfigError(
            "--baseline names a model to compare with, but --no-baseline was given as well: remove one of them"
        )
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
    options: dict[str, Any] = {"config": config, "steps": steps, "root_dir": root_dir}
    if trust_remote_code:
        options["trust_remote_code"] = True
    if group := worker_group_of(nproc, nnodes=nnodes, node_rank=node_rank, rendezvous=rendezvous):
        words = [] if model is None else [model]
        return run_in(group, ["eval", *words, *values, *_options({**settings, **options})], as_json=json)
    with large_imports():
        from llmtrain.verbs.evaluate import evaluate as evaluate_model

    result = evaluate_model(model, overrides=values, settings=settings, **options)
    return Outcome(result, list(_blocks(result)))


def _model_and_overrides(model: str | None, overrides: Sequence[str] | None) -> tuple[str | None, list[str]]:
    """Return MODEL and the overrides. The first word is MODEL unless it is key=value."""
    from llmtrain.config.loading.overrides import looks_like_override

    values = list(overrides or [])
    return (None, [model, *values]) if model is not None and looks_like_override(model) else (model, values)


def _blocks(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the report of benchmarks or of rows, or the few values of an evaluation of token shards."""
    if "tasks" in result:
        yield from _tasks(result)
    elif "scores" in result:
        yield from _of_rows(result)
    else:
        yield named_values(result, ROWS)


def _options(given: Mapping[str, Any]) -> Iterator[str]:
    """Yield the options as command-line arguments, for the processes that --nproc starts."""
    if "baseline" in given and given["baseline"] is None:
        yield "--no-baseline"
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            yield flag if value else f"--no-{name}"
        elif value is not None:
            yield from (f"{flag}={one}" for one in (value if isinstance(value, list) else [value]))


def _of_rows(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the report of an evaluation of rows."""
    models = [("model", str(result["model"]))]
    if result["baseline"]:
        models.append(("baseline", str(result["baseline"])))
    yield Values([*models, ("report", f"{result['output']}/report.html")])
    parts = {**result["files"], "all": result} if len(result["files"]) > 1 else {"all": result}
    yield Table(
        "scores",
        ["", *(parts if len(parts) > 1 else [result["data"]])],
        [
            ["rows", *(f"{part['rows']:,}" for part in parts.values())],
            *([name, *(_value(part["scores"][name]) for part in parts.values())] for name in result["scores"]),
        ],
    )
    if result["comparison"]:
        yield Table(
            "against the baseline",
            ["", "baseline", "model", "difference", "95 % interval", "better", "worse", "same", "verdict"],
            [_compared(name, found) for name, found in result["comparison"].items()],
        )
        yield from _got_worse(result["got_worse"])
    yield from _notes(result)


def _tasks(result: Mapping[str, Any]) -> Iterator[Block]:
    """Yield the report of benchmarks."""
    yield Values([("model", str(result["model"])), ("metrics", f"{result['output']}/metrics.json")])
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
    return [name, _value(found["base"]), _value(found["tuned"]), difference, interval, *rows, found["verdict"]]


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
        lines.append(f"{counted(result['prompts_too_long'], 'prompt fills', 'prompts fill')} the context: no answer")
    if result["rows_without_loss"]:
        lines.append(f"{counted(result['rows_without_loss'], 'row is', 'rows are')} longer than the context: no loss")
    for name, rows in result["rows_not_defined"].items():
        lines.append(f"{name} is not defined for {counted(rows, 'row')}: nothing in what was expected is a word")
    if result["empty_predictions"]:
        lines.append(
            f"{counted(result['empty_predictions'], 'answer is', 'answers are')} empty, and counted like any other"
        )
    if lines:
        yield Lines("notes", lines, "warning")
    contamination = result["contamination"]
    if not contamination["checked"]:
        yield Lines("contamination", [f"not checked: {contamination['why']}"])
    elif contamination["rows"]:
        named = contamination["named"]
        more = f"and {len(named) - MAX_NAMED:,} more" if len(named) > MAX_NAMED else ""
        yield Lines("rows that are among the training rows", [*named[:MAX_NAMED], *([more] if more else [])], "warning")
        if contamination["scores_without"]:
            yield Table(
                "scores with and without them",
                ["", "all rows", "without them"],
                [
                    [name, _value(value), _value(contamination["scores_without"][name])]
                    for name, value in contamination["scores_with"].items()
                ],
            )


def _value(value: float | None) -> str:
    return "not defined" if value is None or not math.isfinite(value) else _number(value)


def _number(value: float | None, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.4g}" if sign and value else f"{value:.4g}"
