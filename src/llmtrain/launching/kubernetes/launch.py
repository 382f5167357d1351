"""A run on a cluster: its name, its config, and the settings of its pods."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from llmtrain.config.sections.kubernetes import KubernetesConfig
from llmtrain.errors import ConfigError
from llmtrain.tracking.redaction import is_secret_name, line_with_secret, redact

PORT: Final = 29400
"""Port of the first pod, at which the pods meet."""
LABEL: Final = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
MAX_LABEL: Final = 63
"""Longest name of a host, a Service or a Job, and longest value of a label."""
REPLICA: Final = "node"
"""Name of the pods' Job inside a JobSet."""

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ClusterRun:
    """A run, and the settings of its pods."""

    name: str
    """Id of the run, name of all its objects, and start of the names of its hosts."""
    settings: KubernetesConfig
    config_text: str
    """Text of the config file. Interpolations are resolved in the pod, which has the variables."""
    config_file: str
    overrides: Sequence[str]
    gpus: int
    """GPUs of each pod."""
    labels: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        common = {"app.kubernetes.io/name": "llmtrain", "app.kubernetes.io/managed-by": "llmtrain"}
        object.__setattr__(self, "labels", common | self.selector)

    @property
    def selector(self) -> dict[str, str]:
        """Label that only this run's objects have."""
        return {"app.kubernetes.io/instance": self.name}

    @property
    def processes(self) -> int:
        """Number of processes in each pod: one for each GPU."""
        return max(1, self.gpus)

    @property
    def first_host(self) -> str:
        """Name by which the other pods reach the first one."""
        return f"{host_name(self.name, kind=self.settings.kind, index=0)}.{self.name}"


def host_name(name: str, *, kind: str, index: int) -> str:
    """Return the host name of a pod of the run `name`."""
    return f"{name}-{REPLICA}-0-{index}" if kind == "jobset" else f"{name}-{index}"


def name_of(wanted: str, *, kind: str, nodes: int) -> str:
    """Return `wanted` as a valid name for the run's objects, short enough for the host name of its last pod.

    A name that is shortened ends in a digest of the full one, so that two long names stay different.
    """
    name = re.sub(r"[^a-z0-9]+", "-", wanted.lower()).strip("-")
    name = name if name[:1].isalpha() else f"run-{name}".strip("-")
    max_length = MAX_LABEL - len(host_name("", kind=kind, index=nodes - 1))
    if len(name) <= max_length:
        return name
    digest = hashlib.sha256(wanted.encode()).hexdigest()[:6]
    return f"{name[: max_length - 7].rstrip('-')}-{digest}"


def check_run(run: ClusterRun) -> None:
    """Raise ConfigError for a secret that others could read in the cluster, and for settings that contradict."""
    settings = run.settings
    for variable, value in settings.env.items():
        if is_secret_name(variable) or redact(value) != value:
            raise ConfigError(
                f"kubernetes.env.{variable} is a secret, which everybody could read in the pods' description: put it "
                f"into a Secret (kubectl create secret generic {settings.env_from} --from-literal={variable}=…)"
            )
    if (line := line_with_secret(run.config_text)) is not None:
        raise ConfigError(
            f"{run.config_file}:{line}: a secret, which everybody could read in the cluster: name an environment "
            f"variable, ${{oc.env:NAME}}, and put the value into a Secret (kubectl create secret generic "
            f"{settings.env_from} --from-literal=NAME=…)"
        )
    if redact(list(run.overrides)) != list(run.overrides):
        raise ConfigError(
            f"an override contains a secret, which everybody could read in the cluster: put it into the Secret "
            f"{settings.env_from}, and write ${{oc.env:NAME}} in the config"
        )
    if settings.gang_scheduling and settings.kind != "job":
        raise ConfigError(
            f"kubernetes.gang_scheduling needs kubernetes.kind: job, but the kind is {settings.kind}: change one"
        )
    privileged: dict[str, str | None] = {"rdma": settings.rdma, "storage.host_path": settings.storage.host_path}
    for key, wanted in privileged.items():
        if wanted and settings.pod_security == "restricted":
            raise ConfigError(
                f"kubernetes.{key} is {wanted}, which restricted Pod Security forbids: set kubernetes.pod_security="
                "privileged and a namespace of its own, kubernetes.namespace"
            )
    if settings.pod_security == "privileged" and settings.namespace in (None, "default"):
        raise ConfigError(
            "kubernetes.pod_security is privileged, which holds for a namespace and all that runs in it: name one for "
            "these runs alone, kubernetes.namespace"
        )
