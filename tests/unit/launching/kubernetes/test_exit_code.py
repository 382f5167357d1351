"""The exit code of a run on a cluster, for each kind of workload."""

from __future__ import annotations

import pytest

from llmtrain.launching.kubernetes.watch import describe_pod, exit_code
from tests.support.kubernetes_api import pod


@pytest.mark.parametrize(
    ("kind", "condition", "message", "codes", "code"),
    [
        ("job", None, "", [75, None], None),
        ("job", "Suspended", "", [], None),
        ("job", "Complete", "", [75, 0], 0),
        ("job", "Failed", "", [75, 42], 42),
        ("job", "Failed", "", [76, 75], 76),
        ("job", "Failed", "", [76, 1], 1),
        ("job", "Failed", "", [137, 75], 1),
        ("job", "Failed", "pod a/b failed with exit code 2 matching FailJob rule", [], 2),
        ("job", "Failed", "Job was active longer than specified deadline", [], 1),
        ("jobset", "Completed", "", [0, 0], 0),
        ("jobset", "Failed", "", [42, 75], 42),
        ("statefulset", None, "", [0, 0], 0),
        ("statefulset", None, "", [0, 75], None),
        ("statefulset", None, "", [75, 2], 2),
        ("statefulset", None, "", [], None),
    ],
)
def test_the_strongest_code_of_the_pods_is_the_run_s(
    kind: str, condition: str | None, message: str, codes: list[int | None], code: int | None
) -> None:
    conditions = [{"type": condition, "status": "True", "message": message}] if condition else []
    documents = [
        pod("one", index) if one is None else pod("one", index, "Failed", terminated={"exitCode": one})
        for index, one in enumerate(codes)
    ]
    pods = [describe_pod(document) for document in documents]
    assert exit_code(kind, {"status": {"conditions": conditions}}, pods) == code
