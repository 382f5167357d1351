"""Calls kubectl, which knows the cluster's address and the user's credentials."""

from __future__ import annotations

import json
import subprocess
from typing import Any, Final

from llmtrain.errors import ConfigError, RunError
from llmtrain.launching.kubernetes.launch import Document

TIMEOUT_SEC: Final = 60
MANAGER: Final = "llmtrain"
"""Owner of the fields that `apply` sets."""
HINTS: Final = {
    "refused": "there is no cluster at that address: look at `kubectl config get-contexts`",
    "namespaces": "create the namespace first: kubectl create namespace NAME",
    "doesn't have a resource type": "the cluster does not know this kind: install its controller, or use --kind job",
    "no matches for kind": "the cluster does not know this kind: install its controller, or use --kind job",
    "forbidden": "your account may not do this: ask for the permission, or give another --namespace",
    "immutable": "a run's pods cannot be changed: delete the run first (llmtrain launch k8s delete), or give --name",
}
"""Remedies, by a part of kubectl's message."""


class Kubectl:
    """kubectl for one namespace; None: kubectl's current one."""

    def __init__(self, namespace: str | None) -> None:
        self._command = ["kubectl", *([f"--namespace={namespace}"] if namespace else [])]

    def run(self, *arguments: str, stdin: str | None = None, timeout_sec: float = TIMEOUT_SEC) -> str:
        """Return kubectl's stdout. Raises RunError with its message and a hint, ConfigError if kubectl is missing."""
        try:
            done = subprocess.run(
                [*self._command, *arguments], input=stdin, capture_output=True, text=True, timeout=timeout_sec
            )
        except FileNotFoundError:
            raise ConfigError(
                "kubectl, which talks to the cluster, is not installed: see kubernetes.io/docs/tasks/tools"
            ) from None
        except subprocess.TimeoutExpired:
            message = f"kubectl {arguments[0]} has not answered for {timeout_sec:.0f} s: is the cluster reachable?"
            raise RunError(message) from None
        if done.returncode:
            message = done.stderr.strip() or f"exit code {done.returncode}"
            hint = next((f"; {hint}" for part, hint in HINTS.items() if part in message), "")
            raise RunError(f"kubectl {arguments[0]}: {message}{hint}")
        return done.stdout

    def get(self, kind: str, name: str) -> Document | None:
        """Return an object; None if it does not exist, or if the cluster does not know its kind."""
        try:
            text = self.run("get", kind, name, "--output=json", "--ignore-not-found")
        except RunError as error:
            if "doesn't have a resource type" in str(error):
                return None
            raise
        found: Document | None = json.loads(text) if text.strip() else None
        return found

    def items(self, kind: str, *options: str) -> list[Document]:
        """Return the objects of a kind that `options` select."""
        items: list[Any] = json.loads(self.run("get", kind, "--output=json", *options))["items"]
        return items

    def apply(self, text: str) -> list[str]:
        """Create or change the objects of a YAML text by server-side apply. Return a line about each."""
        # The server checks every field when it applies them; with --validate, kubectl would first fetch all schemas.
        options = [
            "--server-side",
            "--force-conflicts",
            f"--field-manager={MANAGER}",
            "--validate=false",
            "--filename=-",
        ]
        return self.run("apply", *options, stdin=text).splitlines()

    def logs(self, pod: str, *options: str) -> str:
        """Return the log of a pod; nothing if it has none yet."""
        try:
            return self.run("logs", pod, *options)
        except RunError:
            return ""

    def follow_logs(self, pod: str, *options: str) -> subprocess.Popen[str]:
        """Begin to print the log of a pod as it comes, on this process's stdout."""
        return subprocess.Popen([*self._command, "logs", pod, "--follow", *options], text=True)
