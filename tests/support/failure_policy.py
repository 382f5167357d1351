"""What a Job does with a pod that has failed, by the rules of its manifest."""

from __future__ import annotations

from typing import Any


class FailurePolicy:
    """The podFailurePolicy and the backoffLimit of a rendered Job."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._rules = job["spec"]["podFailurePolicy"]["rules"]
        self._limit = job["spec"]["backoffLimit"]
        self._counted = 0

    def judge(self, code: int) -> None:
        """Count the failure of a pod that ended with `code`, if it counts. Fails where the Job would."""
        actions = [rule["action"] for rule in self._rules if code in rule.get("onExitCodes", {}).get("values", [])]
        assert "FailJob" not in actions, f"exit code {code} fails the Job"
        self._counted += not actions
        assert self._counted <= self._limit, f"{self._counted} failures count, the last with exit code {code}"
