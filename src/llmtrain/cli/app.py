"""The program: all verbs, what is printed, and which exit code an ending has.

    argv ─▶ run ─▶ a verb (prepare.py, convert.py, train.py, …) ─▶ Outcome ─▶ stdout
                     └─ raises ─▶ one message on stderr, and an exit code

No verb is written here. Nothing heavy is imported here, nor by the files of the verbs before one is called.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import typer

from llmtrain.cli import config, convert, evaluate, inspect, machine, model, prepare, publish, runs, smoke, train
from llmtrain.cli.output import Outcome, drop_stdout, json_document
from llmtrain.config.errors import ConfigError, Preempted, RunError
from llmtrain.models.hub import use_older_names

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises for a command line that it cannot read; it exports only this subclass."""

INTERRUPTED = 130

app = typer.Typer(
    name="llmtrain",
    help="One config file takes a decoder-only language model from raw text to a published model.",
    epilog="CONFIG is a YAML or JSON file, or the name of one that ships; MODEL is a run, a checkpoint or a folder.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
prepare.add_to(app)
inspect.add_to(app)
convert.add_to(app)
machine.add_to(app)
train.add_to(app)
evaluate.add_to(app)
model.add_to(app)
publish.add_to(app)
smoke.add_to(app)
runs.add_to(app)
config.add_to(app)


@app.callback()
def _program() -> None:
    """One config file takes a decoder-only language model from raw text to a published model."""


def run(argv: Sequence[str]) -> int:
    """Runs one command line, prints what it gives, and returns the exit code.

    0 done; 1 failed; 2 usage or config error; 42 will fail again; 75 try again; 76 hang; 130 interrupted. With
    `--json` there is one JSON document on stdout, an error's too, and all else goes to stderr.
    """
    if sys.platform == "win32":
        print("error: llmtrain runs on Linux and macOS; on Windows, run it inside WSL2", file=sys.stderr)
        return 2
    use_older_names()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it warns of what only decoding would need
    argv = ["--help"] if not argv else ["version", *argv[1:]] if argv[0] == "--version" else train.name_resume(argv)
    is_help = "--help" in argv or "-h" in argv
    as_json = "--json" in argv and not is_help
    try:
        with _stdout_is_stderr() if as_json else contextlib.nullcontext():
            outcome = _call(argv)
    except typer.Exit as ending:  # --help, which has printed itself
        return _flush(ending.exit_code)
    except UsageError as error:
        return _fail(_usage_message(error), kind="usage", code=2, as_json=as_json)
    except (ConfigError, RunError) as error:
        return _fail(str(error), kind=error.kind, code=error.exit_code, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    except Exception as error:
        if is_help and isinstance(error, BrokenPipeError):
            return drop_stdout()
        traceback.print_exc()
        return _fail(f"{type(error).__name__}: {error}", kind="bug", code=1, as_json=as_json)
    return _print(json_document(outcome.document) if as_json else outcome.text) or outcome.exit_code


def _call(argv: Sequence[str]) -> Outcome:
    """Runs the verb. Typer's own `main` is left out: it makes any broken pipe, a data worker's too, a silent exit."""
    command = typer.main.get_command(app)
    with command.make_context("llmtrain", list(argv)) as context:
        outcome = command.invoke(context)
    assert isinstance(outcome, Outcome)
    return outcome


def _fail(message: str, *, kind: str, code: int, as_json: bool) -> int:
    rank = os.environ.get("RANK", "0")
    what = "stopped" if kind == Preempted.kind else "error"
    print(f"{what}: {message}" if rank == "0" else f"[rank {rank}] {what}: {message}", file=sys.stderr)
    if as_json:
        _print(json_document({"error": {"kind": kind, "message": message, "exit_code": code}}))
    return code


def _print(text: str) -> int:
    """Prints on the first rank alone."""
    if os.environ.get("RANK", "0") != "0" or not text:
        return 0
    try:
        print(text)
    except BrokenPipeError:
        return drop_stdout()
    return _flush(0)


def _flush(code: int) -> int:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return drop_stdout()
    return code


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Sends what anybody prints, libraries in C and child processes too, to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _usage_message(error: Any) -> str:
    """Typer's words, what an old flag is called today, and where help is."""
    message: str = error.format_message()
    option = str(getattr(error, "option_name", ""))
    if option.startswith("--"):
        message += _about_option(option)
    command = error.ctx.command_path if error.ctx else "llmtrain"
    return f"{message}\nsee `{command} --help`"


def _about_option(option: str) -> str:
    from llmtrain.config.renamed import SECTION_AS_VALUE, look_up

    name = option.removeprefix("--").partition("=")[0]
    if "." in name:
        return f"\nkeys of the config are given without dashes: {name}=…"
    renamed = look_up((name,)) or SECTION_AS_VALUE.get(name)
    if not renamed:
        return ""
    return f"\n--{name} {renamed.answer}: {renamed.to[0]}=…" if renamed.to else f"\n--{name}: {renamed.note}"
