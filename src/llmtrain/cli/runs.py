"""runs, report, ui: what was trained, in a list, side by side, as a page, or live."""

from __future__ import annotations

import json as json_library
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, columns

COLUMNS = ("run", "state", "steps", "loss", "val loss", "bits/byte", "tokens", "time", "size")
RESULTS = ("name", "state", "steps", "loss", "val_loss", "best_val_loss", "bits_per_byte", "tokens", "seconds", "bytes")

RootDir = Annotated[str, typer.Option("--root-dir", "--root", metavar="DIR", help="Folder of all runs.")]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("runs")(runs)
    app.command("report")(report)
    app.command("ui")(ui)


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN …]", help="Runs to compare: ids or folders.", show_default=False),
    ] = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            metavar="BY",
            help="time, id, name, state, steps, loss, val_loss, bits_per_byte, tokens, seconds or bytes.",
        ),
    ] = "time",
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """List runs, the newest first, or compare some of them."""
    from llmtrain.recipes.runs import compare_runs, list_runs

    if names:
        compared = compare_runs(names, root_dir=root_dir)
        return Outcome(compared, "\n".join(_comparison(compared)))
    found = list_runs(root_dir=root_dir, sort=sort)
    if not found:
        return Outcome(found, f"{root_dir} has no runs")
    return Outcome(found, "\n".join([*columns(COLUMNS, [_row(run) for run in found]), *_problems(found)]))


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN …]", help="Runs: ids or folders; the newest when none is named.", show_default=False
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="<run>/report.html when not given; ./report.html for several runs."
        ),
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Write one self-contained HTML page: curves, evaluations, config, environment and data of one run or several."""
    from llmtrain.recipes.report import report as recipe

    written = recipe(names or ["latest"], output=output, root_dir=root_dir)
    size = f"{written['bytes'] / 1e6:.1f} MB, {written['points']:,} points"
    return Outcome(written, "\n".join([f"{written['report']} ({size})", *written["problems"]]))


def ui(
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="Where to serve.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", metavar="N", min=0, max=65535, help="0: any that is free.")] = 8765,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Show all runs live in the browser: list, compare, follow one that trains, and let its model write."""
    from llmtrain.recipes.ui import serve

    def ready(url: str) -> None:
        print(f"{url}  (Ctrl-C ends)", file=sys.stderr, flush=True)

    return Outcome(serve(root_dir=root_dir, host=host, port=port, ready=ready), "")


def _row(run: Mapping[str, Any]) -> list[str]:
    from llmtrain.tracking.metrics import short_count, short_duration

    def show(value: Any, write: Any) -> str:
        return "" if value is None else str(write(value))

    return [
        run["id"],
        run["state"],
        show(run["steps"], "{:,}".format),
        show(run["loss"], "{:.4f}".format),
        show(run["val_loss"], "{:.4f}".format),
        show(run["bits_per_byte"], "{:.3f}".format),
        show(run["tokens"], short_count),
        show(run["seconds"], short_duration),
        short_count(run["bytes"]) + "B",
    ]


def _problems(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{run['id']}: {problem}" for run in found for problem in run["problems"]]
    return ["", *lines] if lines else []


def _comparison(compared: Mapping[str, Any]) -> Iterator[str]:
    runs = compared["runs"]
    head = ["", *(run["id"] for run in runs)]
    yield from columns(head, [[key, *(_value(run[key]) for run in runs)] for key in RESULTS])
    for title, rows in (("config", compared["config"]), ("last figures", compared["figures"])):
        if rows and (title != "config" or len(runs) > 1):
            yield f"\n{title}" + (" (where it differs)" if title == "config" else "")
            yield from columns(head, [[row["key"], *map(_value, row["values"])] for row in rows], with_head=False)
        elif title == "config" and len(runs) > 1:
            yield "\nthe configs are the same"
    yield from _problems(runs)


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e6 else f"{value:,.0f}"
    if isinstance(value, str | int) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else value
    return json_library.dumps(value, ensure_ascii=False)
