"""runs, report, ui: shows runs as a list, side by side, as a page, or live."""

from __future__ import annotations

import json as json_library
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json, local, readable, stored
from llmtrain.cli.output import Outcome, printable
from llmtrain.errors import ConfigError
from llmtrain.reports.blocks import Block, Lines, Table

COLUMNS = ("run", "state", "steps", "loss", "best val", "tok/s", "tokens", "time", "age", "size")
DISPENSABLE = ("tokens", "size", "time", "loss")
"""Columns that a narrow terminal leaves out, in this order."""
RESULTS = (
    *("name", "state", "steps", "loss", "val_loss", "best_val_loss", "bits_per_byte"),
    *("tokens_per_sec", "tokens", "seconds", "bytes"),
)
CURVES = {"train/loss": "the mean up to each step", "val/loss": "the newest value at each step"}
REMOVE = "rm"
UPLOAD = "upload"

RootDir = Annotated[
    str,
    typer.Option("--root-dir", "--root", metavar="DIR", callback=stored, help="Folder of all runs, or its address."),
]


def add_to(app: typer.Typer) -> None:
    """Add the commands of this file to the program."""
    app.command("runs")(runs)
    app.command("report")(report)
    app.command("ui")(ui)


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="rm|upload|RUN",
            callback=readable,
            help="Runs to compare, or after rm to remove, after upload to upload: ids, folders or addresses.",
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only runs in this state: running, finished, preempted, failed or killed; may be repeated.",
        ),
    ] = None,
    find: Annotated[
        str | None, typer.Option("--find", metavar="TEXT", help="Only runs with TEXT in id, name, notes or a tag.")
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Only the first N.")] = None,
    sort: Annotated[
        str,
        typer.Option(
            "--sort",
            metavar="BY",
            help="time, id, name, state, steps, loss, val_loss, best_val_loss, bits_per_byte, tokens_per_sec, tokens, "
            "seconds or bytes.",
        ),
    ] = "time",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="With rm: remove without asking.")] = False,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """List runs, compare some, remove some, or upload some to their store.

    Without RUN it lists all runs, the newest first; with the address of a folder of runs, those there. `rm RUN …`
    removes runs, but never one that is training. `upload RUN …` uploads what the store of a run lacks.
    """
    from llmtrain.verbs.runs import compare_runs, holds_runs, list_runs, upload_runs

    if names and names[0] == UPLOAD:
        done = upload_runs(names[1:], root_dir=root_dir)
        return Outcome(done, [Lines(f"{one['address']} is complete ({one['objects']} objects)", ()) for one in done])
    if names and names[0] == REMOVE:
        return _remove(names[1:], root_dir=root_dir, yes=yes)
    if yes:
        raise ConfigError("--yes is for `runs rm RUN …`: remove it")
    if names and len(names) == 1 and holds_runs(names[0]):
        root_dir, names = names[0], None
    if names:
        if state or find or limit:
            raise ConfigError("--state, --find and --limit choose runs of the list: remove them, or the names of runs")
        compared = compare_runs(names, root_dir=root_dir)
        return Outcome(compared, list(_comparison(compared)))
    found = list_runs(root_dir=root_dir, sort=sort, states=state or (), find=find, limit=limit)
    if not found:
        none = "such runs" if state or find else "runs yet: `llmtrain train CONFIG` makes the first"
        return Outcome(found, [Lines(f"{root_dir} has no {none}", ())])
    return Outcome(found, [_table(found), *_problems(found)])


def report(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN", callback=readable, help="Runs, by id, folder or address; the newest when none is named."
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            callback=local,
            help="File to write: <run>/report.html, or ./report.html for several runs.",
        ),
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Write an HTML page about one run or several.

    It is self-contained, and shows curves, evaluations, config, environment and data.
    """
    from llmtrain.verbs.report import report as write_report

    written = write_report(names or ["latest"], output=output, root_dir=root_dir)
    size = f"{written['bytes'] / 1e6:.1f} MB, {written['points']:,} points"
    return Outcome(written, [Lines(f"{written['report']} ({size})", written["problems"])])


def ui(
    host: Annotated[
        str,
        typer.Option("--host", metavar="ADDRESS", help="Address to serve at; one that others reach makes a token."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="N", min=0, max=65535, help="Port; 0 takes a free one.")
    ] = 8765,
    token_file: Annotated[
        str | None,
        typer.Option(
            "--token-file", metavar="FILE", callback=local, help="File with the token that every request needs."
        ),
    ] = None,
    root_dir: RootDir = "runs",
    json: Json = False,
) -> Outcome:
    """Show all runs live in the browser.

    List and compare them, follow one that trains, and generate text with its model.
    """
    from llmtrain.verbs.ui import serve

    def ready(url: str) -> None:
        print(f"{url}  (Ctrl-C ends)", file=sys.stderr, flush=True)

    return Outcome(serve(root_dir=root_dir, host=host, port=port, token_file=token_file, ready=ready), "")


def _remove(names: Sequence[str], *, root_dir: str, yes: bool) -> Outcome:
    from llmtrain.verbs.runs import remove_runs

    def confirm(found: Sequence[Mapping[str, Any]]) -> bool:
        if yes:
            return True
        users = [f"{user} started from a model in {run['id']}" for run in found for user in run["used_by"]]
        print(printable([_table(found), *(Lines(line, ()) for line in users)], stream=2), file=sys.stderr)
        if not sys.stdin.isatty():
            raise ConfigError("there is nobody to ask: add --yes to remove these runs for good")
        print("Remove for good? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    if not names:
        raise ConfigError("runs rm: name the runs to remove, by id or folder")
    done = remove_runs(names, root_dir=root_dir, agree=confirm)
    if not done["removed"]:
        return Outcome(done, "nothing was removed", 1)
    return Outcome(done, f"removed {', '.join(done['removed'])} ({_bytes(done['bytes'])})")


def _table(found: Sequence[Mapping[str, Any]]) -> Table:
    return Table("", COLUMNS, [_row(run) for run in found], DISPENSABLE)


def _row(run: Mapping[str, Any]) -> list[str]:
    from llmtrain.tracking.metric_names import short_count, short_duration

    def show(value: Any, write: Any) -> str:
        return "" if value is None else str(write(value))

    return [
        run["id"],
        run["state"],
        show(run["steps"], "{:,}".format),
        show(run["loss"], "{:.4f}".format),
        show(_first(run["best_val_loss"], run["val_loss"]), "{:.4f}".format),
        show(run["tokens_per_sec"], short_count),
        show(run["tokens"], short_count),
        show(run["seconds"], short_duration),
        show(_age(run), short_duration),
        _bytes(run["bytes"]),
    ]


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _age(run: Mapping[str, Any]) -> float | None:
    """Return the seconds since the run started."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(run["time"])).total_seconds()
    except (TypeError, ValueError):  # unknown, or a time without a zone
        return None


def _bytes(number: int) -> str:
    from llmtrain.tracking.metric_names import short_count

    return short_count(number) + "B"


def _problems(found: Sequence[Mapping[str, Any]]) -> Iterator[Block]:
    yield from (Lines(f"{run['id']}: {problem}", ()) for run in found for problem in run["problems"])


def _comparison(compared: Mapping[str, Any]) -> Iterator[Block]:
    """Yield tables with the same head, so that all values of a run are in one column."""
    runs = compared["runs"]
    head = ["", *(run["id"] for run in runs)]
    yield Table("", head, [[key, *(_value(run[key]) for run in runs)] for key in RESULTS])
    if len(runs) > 1:
        title = "config, where it differs" if compared["config"] else "the configs are the same"
        yield Table(title, head, [[row["key"], *map(_value, row["values"])] for row in compared["config"]])
    for name, rows in compared["curves"].items():
        if rows:
            by_step = [[f"{row['step']:,}", *map(_loss, row["values"])] for row in rows]
            yield Table(f"{name}, {CURVES[name]}", head, by_step)
    if compared["evaluations"]:
        rows = [[row["key"], *map(_value, row["values"])] for row in compared["evaluations"]]
        yield Table("the last results of `llmtrain eval`", head, rows)
    yield Table("last metrics", head, [[row["key"], *map(_value, row["values"])] for row in compared["metrics"]])
    yield from _problems(runs)
    if len(runs) > 1:
        yield Lines(f"The curves as a page: llmtrain report {' '.join(run['id'] for run in runs)}", ())


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _value(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.6g}"
    if isinstance(value, str | int) and not isinstance(value, bool):
        return f"{value:,}" if isinstance(value, int) else value
    return json_library.dumps(value, ensure_ascii=False)
