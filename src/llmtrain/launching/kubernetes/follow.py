"""Follows a run on a cluster to its end: prints its log, names what is wrong, and returns the run's own exit code."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.pod import CONTAINER
from llmtrain.launching.kubernetes.watch import PodSeen, Seen, age_sec, look

POLL_SEC: Final = 2.0
PATIENCE_SEC: Final = 300.0


def follow(
    kubectl: Kubectl,
    name: str,
    *,
    say: Callable[[str], None],
    patience_sec: float = PATIENCE_SEC,
) -> Seen:
    """Return the run's state at its end. `say` is told each new thing that is wrong with it.

    Raises RunError if a pod waits in vain, or has waited for a node for more than `patience_sec`; the run stays as it
    is. Raises ConfigError if there is no such run.
    """
    told: set[str] = set()
    log = _Log(kubectl)
    try:
        while True:
            seen = look(kubectl, name)
            for cause in _causes(seen):
                if cause not in told:
                    say(cause)
                    told.add(cause)
            log.show(next((pod for pod in seen.pods if pod.index == 0), None))
            if seen.exit_code is not None:
                return seen
            _reject_waiting(name, seen, patience_sec=patience_sec)
            time.sleep(POLL_SEC)
    except ConfigError:
        if not told and log.is_new:
            raise
        raise RunError(f"the run {name} was deleted while it was followed") from None
    finally:
        log.close()


def _causes(seen: Seen) -> list[str]:
    causes = [f"{pod.name}: {pod.cause}" for pod in seen.pods if pod.cause]
    return [*causes, *([seen.cause] if seen.cause else [])]


def _reject_waiting(name: str, seen: Seen, *, patience_sec: float) -> None:
    after = f"; the run is still there: llmtrain launch k8s delete {name}"
    for pod in seen.pods:
        if pod.in_vain:
            raise RunError(f"{pod.name} cannot start: {pod.cause}{after}")
        if pod.pending and age_sec(pod, now=datetime.now(UTC)) > patience_sec:
            raise RunError(
                f"{pod.name} has had no node for {patience_sec:.0f} s: {pod.cause or 'no reason given'}{after}"
            )
    if seen.cause and seen.cause.startswith("FailedCreate"):
        raise RunError(f"the cluster makes no pods, {seen.cause}{after}")


class _Log:
    """The log of the first pod, printed as it comes; that of its successor when it is replaced."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl
        self._pod: str | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_new(self) -> bool:
        """True if no pod has been shown yet."""
        return self._pod is None

    def show(self, pod: PodSeen | None) -> None:
        if pod is None or pod.phase == "Pending" or pod.name == self._pod:
            return
        self.close()
        self._pod = pod.name
        self._process = self._kubectl.follow_logs(pod.name, f"--container={CONTAINER}")

    def close(self) -> None:
        """Wait for the rest of the log of a pod that has ended; stop at that of one that has not."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process = None
