"""The program: its commands, what it prints, and its exit codes.

    argv ─▶ run ─▶ a command (prepare.py, convert.py, train.py, …) ─▶ Outcome ─▶ stdout
                     └─ raises ─▶ one message on stderr, and an exit code

No command is defined here. Only the file of the given command is imported, and none of these files imports anything
large before its command is called.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, Final

import typer

from llmtrain.cli.options import name_resume
from llmtrain.cli.output import Outcome, json_document, printable, stdout_is_read
from llmtrain.errors import ConfigError, Preempted, RunError, in_surroundings
from llmtrain.models.fetch import use_older_names
from llmtrain.screen import known_width, visible, wrapped

UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""Error that Typer raises for a command line that it cannot parse. Typer exports only a subclass of it."""

INTERRUPTED = 130

VERBS: Final = {
    "prepare": ("prepare",),
    "inspect": ("inspect",),
    "convert": ("convert",),
    "plan": ("plan",),
    "doctor": ("doctor",),
    "train": ("train",),
    "evaluate": ("eval",),
    "generate": ("generate",),
    "publish": ("export", "merge", "publish"),
    "launch": ("launch",),
    "smoke": ("smoke",),
    "health": ("health",),
    "runs": ("runs", "report", "ui"),
    "lineage": ("lineage",),
    "config": ("validate", "print-config", "list-configs", "version"),
}
"""File of this folder → its commands, in the order of `--help`."""


WORKS: Final = ("prepare", "convert", "train", "export", "merge", "publish")
"""Commands whose result is in files: they have succeeded even if nobody reads their stdout."""


def program(verb: str | None = None) -> typer.Typer:
    """Return the program with only the file of the command `verb`; with all files if there is no such command."""
    app = typer.Typer(
        name="llmtrain",
        help="One config file takes a decoder-only language model from raw text to a published model.",
        epilog="CONFIG is a YAML or JSON file or the name of a shipped one; MODEL is a run, a checkpoint or a folder.",
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )
    app.callback()(_program)
    for file in [file for file, verbs in VERBS.items() if verb in verbs] or VERBS:
        import_module(f"llmtrain.cli.{file}").add_to(app)
    return app


def _program() -> None:
    """One config file takes a decoder-only language model from raw text to a published model."""


def run(argv: Sequence[str]) -> int:
    """Run one command line, print its result, and return the exit code.

    0 done; 1 failed; 2 usage or config error; 42 will fail again; 75 try again; 76 hang; 130 interrupted. With
    `--json` one JSON document goes to stdout, also for an error, and everything else to stderr.
    """
    if sys.platform == "win32":
        print("error: llmtrain runs on Linux and macOS; on Windows, run it inside WSL2", file=sys.stderr)
        return 2
    use_older_names()
    # On import bitsandbytes warns of libraries that only its decoding needs.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    argv = ["--help"] if not argv else ["version", *argv[1:]] if argv[0] == "--version" else name_resume(argv)
    is_help = "--help" in argv or "-h" in argv
    as_json = "--json" in argv and not is_help
    try:
        with _stdout_is_stderr() if as_json else contextlib.nullcontext():
            outcome = _call(argv)
    except typer.Exit as ending:  # --help, which has printed itself
        return ending.exit_code if stdout_is_read() else 1
    except UsageError as error:
        return _fail(_usage_message(error, argv), kind="usage", code=2, as_json=as_json)
    except (ConfigError, RunError) as error:
        return _fail(str(error), kind=error.kind, code=error.exit_code, as_json=as_json)
    except (KeyboardInterrupt, typer.Abort):
        return _fail("interrupted", kind="interrupted", code=INTERRUPTED, as_json=as_json)
    except Exception as error:
        if (message := in_surroundings(error)) is not None:
            return _fail(message, kind=RunError.kind, code=RunError.exit_code, as_json=as_json)
        print(visible(traceback.format_exc()), file=sys.stderr)
        return _fail(f"{type(error).__name__}: {error}", kind="bug", code=1, as_json=as_json)
    try:
        _print(json_document(outcome.document) if as_json else printable(outcome.text))
    except OSError as error:
        return _fail(f"stdout takes no more: {error.strerror}", kind="failed", code=1, as_json=False)
    return outcome.exit_code if argv[0] in WORKS or stdout_is_read() else 1


def _call(argv: Sequence[str]) -> Outcome:
    """Run the command without Typer's `main`, which exits silently at any broken pipe, also a data worker's."""
    command = typer.main.get_command(program(argv[0]))
    with command.make_context("llmtrain", list(argv)) as context:
        outcome = command.invoke(context)
    assert isinstance(outcome, Outcome)
    return outcome


def _fail(message: str, *, kind: str, code: int, as_json: bool) -> int:
    rank = os.environ.get("RANK", "0")
    what = "stopped" if kind == Preempted.kind else "error"
    text = f"{what}: {message}" if rank == "0" else f"[rank {rank}] {what}: {message}"
    for line in visible(text).split("\n"):
        print("\n".join(wrapped(line, known_width(2), indent=2)), file=sys.stderr)
    if as_json:
        _print(json_document({"error": {"kind": kind, "message": message, "exit_code": code}}))
    return code


def _print(text: str) -> None:
    """Print on rank 0 only."""
    if os.environ.get("RANK", "0") == "0" and text:
        print(text, flush=True)


@contextlib.contextmanager
def _stdout_is_stderr() -> Iterator[None]:
    """Redirect stdout to stderr within the block, also for C libraries and child processes."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _usage_message(error: Any, argv: Sequence[str]) -> str:
    """Return Typer's message, answers to old commands and flags, and how to get help."""
    from llmtrain.cli.unknown_flags import answers
    from llmtrain.config.loading.renamed import old_command

    message: str = error.format_message()
    command = error.ctx.command if error.ctx is not None and error.ctx.parent is not None else None
    if str(getattr(error, "option_name", "")).startswith("--"):
        message = "\n".join([message, *answers(argv, command)])
    elif command is None and (instead := old_command(argv[0])):
        message += f"\n{instead}"
    return f"{message}\nsee `{error.ctx.command_path if error.ctx else 'llmtrain'} --help`"
