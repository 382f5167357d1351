"""Count how often a run was started from the same checkpoint: a crash loop ends instead of burning a cluster's hours.

Progress is a newer checkpoint. The count lies in the run's folder while the run is not over, so it holds for whoever
starts it again: torchrun, a pod's supervisor or a person.
"""

from __future__ import annotations

import json
from pathlib import Path

from llmtrain.atomic import write_json
from llmtrain.errors import WillFailAgain

MAX_RESTARTS = 3
"""Without progress."""

_FILE = "attempts.json"


def count_restart(run: Path, *, checkpoint: Path | None) -> str | None:
    """Note that `run` is started again, from `checkpoint`; what to say if that happened too often already.

    The message is returned, not raised, so that all ranks can end alike: see `refuse_crash_loop`.
    """
    start = checkpoint.name if checkpoint else None
    try:
        before = json.loads((run / _FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = {}
    restarts = 1 + (before.get("restarts", 0) if before.get("checkpoint") == start else 0)
    if restarts > MAX_RESTARTS:
        return (
            f"{run.name} was started {MAX_RESTARTS} times from {start or 'its beginning'} and never came to the next "
            f"checkpoint: see {run / 'logs'} for why. To try again all the same, remove {run / _FILE}"
        )
    write_json(run / _FILE, {"checkpoint": start, "restarts": restarts})
    return None


def refuse_crash_loop(message: str | None) -> None:
    """Raise WillFailAgain (exit 42) if there is something to say."""
    if message is not None:
        raise WillFailAgain(message)


def forget_restarts(run: Path) -> None:
    """The run ended well, or was stopped and saved: what comes is no crash loop."""
    (run / _FILE).unlink(missing_ok=True)
