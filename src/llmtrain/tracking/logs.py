"""Writes a run's log: lines on the terminal, JSON lines, and files under <run>/logs.

All loggers are below the logger "llmtrain". A stage logs as `llmtrain.<stage>`, and its lines show that name:

    12:01:33 INFO  [model] 14.2M parameters

Loggers of other libraries are not changed. In every line, secrets are redacted and control characters are escaped. On a
terminal a line is wrapped between words; a pipe and a file get one line for each record.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from rich.text import Text

from llmtrain.config.sections.running import LoggingConfig
from llmtrain.errors import ConfigError, Preempted, RunError
from llmtrain.screen import visible, wrapped
from llmtrain.tracking import terminal
from llmtrain.tracking.redaction import redact

ROOT_LOGGER: Final = "llmtrain"

_LEVEL_STYLES: Final = {"WARNING": "yellow", "ERROR": "bold red", "CRITICAL": "bold red", "DEBUG": "dim"}
_INDENT: Final = len("12:01:33 ")
_OWN_FIELDS: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


def setup_logging(config: LoggingConfig, *, run_folder: Path | None, rank: int) -> None:
    """Set up the logger "llmtrain" by `config`. A second call replaces the outputs of the first.

    Rank 0 writes to stderr and, once there is a run folder, to <run>/logs/<file_name>; other ranks write only to
    <run>/logs/rank_<rank>.log. Files are appended to. Raises ConfigError if a file cannot be opened.
    """
    handlers: list[logging.Handler] = [ConsoleHandler(as_json=config.json_output, rank=rank)] if rank == 0 else []
    if config.log_to_file and run_folder is not None:
        path = run_folder / "logs" / (config.file_name if rank == 0 else f"rank_{rank}.log")
        handlers.append(_open_file(path, as_json=config.json_output, rank=rank))
    reset_logging()
    terminal.set_lines_only(config.json_output)
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in handlers or [logging.NullHandler()]:
        logger.addHandler(handler)
    logger.setLevel(config.level)
    # A library that calls `logging.warning(…)` adds a handler to the root logger: each line would appear twice.
    logger.propagate = False


def reset_logging() -> None:
    """Close the outputs that `setup_logging` opened and restore the logger's defaults."""
    logger = logging.getLogger(ROOT_LOGGER)
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True
    terminal.set_lines_only(False)


def log_end_reason(error: Exception) -> None:
    """Write the error that ends a run to its log files only, since the command shows it on the terminal."""
    level = logging.WARNING if isinstance(error, Preempted) else logging.ERROR
    trace = None if isinstance(error, ConfigError | RunError) else error
    extra = {"in_files_alone": True}
    logging.getLogger("llmtrain.run").log(level, "%s", error or type(error).__name__, exc_info=trace, extra=extra)


class ConsoleHandler(logging.Handler):
    """Prints log lines on the shared console, above a live bar if there is one."""

    def __init__(self, *, as_json: bool, rank: int) -> None:
        super().__init__()
        self._as_json = as_json
        self.setFormatter(_JsonFormatter(rank=rank) if as_json else _TextFormatter(time_format="%H:%M:%S", utc=False))

    def emit(self, record: logging.LogRecord) -> None:
        """Print the record, unless a live bar shows its content. A warning is also shown below the bar."""
        if getattr(record, "in_files_alone", False) or (
            terminal.bar_is_live() and getattr(record, "shown_by_bar", False)
        ):
            return
        try:
            if record.levelno >= logging.WARNING:
                terminal.warn_bar(visible(redact(record.getMessage())))
            written, console = self.format(record), terminal.stderr_console()
            if not self._as_json and console.file.isatty():
                lines = [part for line in written.split("\n") for part in wrapped(line, console.width, indent=_INDENT)]
                written = "\n".join(lines)
            text = Text(written, style="" if self._as_json else _LEVEL_STYLES.get(record.levelname, ""))
            if not self._as_json:
                text.stylize("dim", 0, len("12:01:33"))
            console.print(text, soft_wrap=True)
        except Exception:
            # `logging` requires this of a handler: a closed pipe or a bad format string must not end the program.
            self.handleError(record)


class _LogFile(logging.FileHandler):
    """A log file that is dropped, with one line on the terminal, if it cannot be written any more (a full disk)."""

    def handleError(self, record: logging.LogRecord) -> None:
        logger = logging.getLogger(ROOT_LOGGER)
        if self in logger.handlers:
            logger.removeHandler(self)
            logger.warning("%s cannot be written any more; the run goes on without it", self.baseFilename)


def _open_file(path: Path, *, as_json: bool, rank: int) -> logging.Handler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handler = _LogFile(path, encoding="utf-8")
    except OSError as error:
        message = (
            f"cannot write the log file {path}: {error.strerror}: make the folder writable, or set "
            "logging.log_to_file=false"
        )
        raise ConfigError(message) from None
    handler.setFormatter(
        _JsonFormatter(rank=rank) if as_json else _TextFormatter(time_format="%Y-%m-%dT%H:%M:%SZ", utc=True)
    )
    return handler


class _TextFormatter(logging.Formatter):
    def __init__(self, *, time_format: str, utc: bool) -> None:
        super().__init__()
        self._time_format = time_format
        self._utc = utc

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, tz=UTC)
        shown = (when if self._utc else when.astimezone()).strftime(self._time_format)
        message = visible(redact(_with_traceback(self, record)))
        level = "WARN" if record.levelno == logging.WARNING else record.levelname
        return f"{shown} {level:<5} [{_stage(record)}] {message}"


class _JsonFormatter(logging.Formatter):
    def __init__(self, *, rank: int) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, tz=UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "stage": _stage(record),
            "rank": self._rank,
            "message": redact(_with_traceback(self, record)),
        }
        extra = {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}
        extra = {name: value for name, value in extra.items() if name not in ("shown_by_bar", "in_files_alone")}
        return json.dumps(line | redact(extra), default=str)


def _stage(record: logging.LogRecord) -> str:
    """Return the last part of the logger's name: `model` for llmtrain.model."""
    return record.name.rpartition(".")[2]


def _with_traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    message = record.getMessage()
    return f"{message}\n{formatter.formatException(record.exc_info)}" if record.exc_info else message
