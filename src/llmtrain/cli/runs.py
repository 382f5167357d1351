"""runs, report, ui: what was trained, in a list, side by side, as a page, or live."""

from __future__ import annotations

import json as json_library
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from llmtrain.cli.options import Json
from llmtrain.cli.output import Outcome, columns
from llmtrain.config.errors import ConfigError

COLUMNS = ("run", "state", "steps", "loss", "best val", "tok/s", "tokens", "time", "age", "size")
DISPENSABLE = ("tokens", "size", "time", "loss")
"""Columns that go first where a terminal is narrow."""
RESULTS = (
    *("name", "state", "steps", "loss", "val_loss", "best_val_loss", "bits_per_byte"),
    *("tokens_per_sec", "tokens", "seconds", "bytes"),
)
REMOVE = "rm"

RootDir = Annotated[str, typer.Option("--root-dir", "--root", metavar="DIR", help="Folder of all runs.")]


def add_to(app: typer.Typer) -> None:
    """Adds this file's verbs to the program."""
    app.command("runs")(runs)
    app.command("report")(report)
    app.command("ui")(ui)


def runs(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[rm] [RUN …]", help="Runs to compare, or to remove: ids or folders.", show_default=False
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            "--state",
            metavar="STATE",
            help="Only runs that are running, finished, preempted, failed or killed; may be repeated.",
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
    """List runs, the newest first, compare some of them, or remove some (rm RUN …).

    A run that trains is never removed.
    """
    from llmtrain.recipes.runs import compare_runs, list_runs

    if names and names[0] == REMOVE:
        return _remove(names[1:], root_dir=root_dir, yes=yes)
    if yes:
        raise ConfigError("--yes belongs to `runs rm RUN …`")
    if names:
        if state or find or limit:
            raise ConfigError("--state, --find and --limit choose from the list; here runs are named already")
        compared = compare_runs(names, root_dir=root_dir)
        return Outcome(compared, "\n".join(_comparison(compared)))
    found = list_runs(root_dir=root_dir, sort=sort, states=state or (), find=find, limit=limit)
    if not found:
        return Outcome(found, f"{root_dir} has no {'such ' if state or find else ''}runs")
    return Outcome(found, "\n".join([*_table(found), *_problems(found)]))


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


def _remove(names: Sequence[str], *, root_dir: str, yes: bool) -> Outcome:
    from llmtrain.recipes.remove_runs import remove_runs

    def ask(about: Sequence[Mapping[str, Any]]) -> bool:
        if yes:
            return True
        print("\n".join(_table(about)), file=sys.stderr)
        for run in about:
            for user in run["used_by"]:
                print(f"{user} begins from something in {run['id']}", file=sys.stderr)
        if not sys.stdin.isatty():
            raise ConfigError("there is nobody to ask: add --yes to remove these runs for good")
        print("Remove for good? [y/N] ", end="", file=sys.stderr, flush=True)
        return sys.stdin.readline().strip().lower() in ("y", "yes")

    if not names:
        raise ConfigError("runs rm: which? Name ids or folders of runs")
    done = remove_runs(names, root_dir=root_dir, agree=ask)
    if not done["removed"]:
        return Outcome(done, "nothing is removed", 1)
    return Outcome(done, f"removed {', '.join(done['removed'])} ({_bytes(done['bytes'])})")


def _table(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs; on a terminal without the columns that it has no room for."""
    head, rows = list(COLUMNS), [_row(run) for run in found]
    lines = columns(head, rows)
    if sys.stdout.isatty():
        for name in DISPENSABLE:
            if max(map(len, lines)) <= shutil.get_terminal_size().columns:
                break
            index = head.index(name)
            head, rows = [*head[:index], *head[index + 1 :]], [[*row[:index], *row[index + 1 :]] for row in rows]
            lines = columns(head, rows)
    return lines


def _row(run: Mapping[str, Any]) -> list[str]:
    from llmtrain.tracking.metrics import short_count, short_duration

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
    """Seconds since it began."""
    try:
        return (datetime.now(UTC) - datetime.fromisoformat(run["time"])).total_seconds()
    except (TypeError, ValueError):  # unknown, or no time with a zone
        return None


def _bytes(number: int) -> str:
    from llmtrain.tracking.metrics import short_count

    return short_count(number) + "B"


def _problems(found: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"{run['id']}: {problem}" for run in found for problem in run["problems"]]
    return ["", *lines] if lines else []


def _comparison(compared: Mapping[str, Any]) -> Iterator[str]:
    """Sections of one table, so that a run's figures stand below each other throughout."""
    runs = compared["runs"]
    several = len(runs) > 1
    sections = [("", [[key, *(_value(run[key]) for run in runs)] for key in RESULTS])]
    if several:
        title = "config, where it differs" if compared["config"] else "the configs are the same"
        sections.append((title, [[row["key"], *map(_value, row["values"])] for row in compared["config"]]))
    for name, rows in compared["curves"].items():
        if rows:
            by_step = [[f"{row['step']:,}", *map(_loss, row["values"])] for row in rows]
            sections.append((f"{name}, the mean up to each step", by_step))
    if compared["evaluations"]:
        rows = [[row["key"], *map(_value, row["values"])] for row in compared["evaluations"]]
        sections.append(("what `llmtrain eval` measured last", rows))
    sections.append(("last figures", [[row["key"], *map(_value, row["values"])] for row in compared["figures"]]))
    first, *lines = columns(["", *(run["id"] for run in runs)], [row for _, rows in sections for row in rows])
    yield first
    for title, section in sections:
        if title:
            yield f"\n{title}"
        yield from lines[: len(section)]
        del lines[: len(section)]
    yield from _problems(runs)
    if several:
        yield f"\nThe curves as a page: llmtrain report {' '.join(run['id'] for run in runs)}"


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
