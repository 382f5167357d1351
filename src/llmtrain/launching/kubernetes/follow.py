"""Follows a run on a cluster to its end: prints its log, reports what is wrong, and returns its final state."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.pod import CONTAINER
from llmtrain.launching.kubernetes.watch import ClusterState, PodState, age_sec, read_state

POLL_SEC: Final = 2.0
PATIENCE_SEC: Final = 300.0


def follow(
    kubectl: Kubectl,
    name: str,
    *,
    say: Callable[[str], None],
    patience_sec: float = PATIENCE_SEC,
) -> ClusterState:
    """Wait until the run ends and return its state. `say` is called with each new problem.

    Raises RunError if a pod can never start, or has waited for a node for more than `patience_sec`; the run is not
    changed. Raises ConfigError if there is no such run.
    """
    reported: set[str] = set()
    log = _Log(kubectl)
    try:
        while True:
            state = read_state(kubectl, name)
            for cause in _causes(state):
                if cause not in reported:
                    say(cause)
                    reported.add(cause)
            log.show(next((pod for pod in state.pods if pod.index == 0), None))
            if state.exit_code is not None:
                return state
            _reject_waiting(name, state, patience_sec=patience_sec)
            time.sleep(POLL_SEC)
    except ConfigError:
        if not reported and log.is_new:
            raise
        raise RunError(f"the run {name} was deleted while it was followed") from None
    finally:
        log.close()


def _causes(state: ClusterState) -> list[str]:
    causes = [f"{pod.name}: {pod.cause}" for pod in state.pods if pod.cause]
    return [*causes, *([state.cause] if state.cause else [])]


def _reject_waiting(name: str, state: ClusterState, *, patience_sec: float) -> None:
    after = f"; the run is still there: llmtrain launch k8s delete {name}"
    for pod in state.pods:
        if pod.is_stuck:
            raise RunError(f"{pod.name} cannot start: {pod.cause}{after}")
        if pod.pending and age_sec(pod, now=datetime.now(UTC)) > patience_sec:
            raise RunError(
                f"{pod.name} has had no node for {patience_sec:.0f} s: {pod.cause or 'no reason given'}{after}"
            )
    if state.cause and state.cause.startswith("FailedCreate"):
        raise RunError(f"the cluster creates no pods, {state.cause}{after}")


class _Log:
    """Prints the log of the first pod as it comes; if the pod is replaced, that of the new one."""

    def __init__(self, kubectl: Kubectl) -> None:
        self._kubectl = kubectl
        self._pod: str | None = None
        self._process: subprocess.Popen[str] | None = None

    @property
    def is_new(self) -> bool:
        """True if no pod has been shown yet."""
        return self._pod is None

    def show(self, pod: PodState | None) -> None:
        if pod is None or pod.phase == "Pending" or pod.name == self._pod:
            return
        self.close()
        self._pod = pod.name
        self._process = self._kubectl.follow_logs(pod.name, f"--container={CONTAINER}")

    def close(self) -> None:
        """Wait for the rest of the log, and stop following it if it does not end, since its pod still runs."""
        if self._process is None:
            return
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait()
        self._process = None
