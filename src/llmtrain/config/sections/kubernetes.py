"""`kubernetes`: the pods of a run on a cluster, for `launch k8s`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config.sections.base import Section, opt

QUANTITY = r"^\d+(\.\d+)?(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$"
VOLUMES = ("runs", "data", "models", "cache")
TAINT = r"^[^:=]+(=[^:=]*)?(:(NoSchedule|PreferNoSchedule|NoExecute))?$"


class StorageConfig(Section):
    """The volumes /runs, /data, /models and /cache, which all pods share and which outlive the run."""

    runs: str = opt("100Gi", "Size of the claim for /runs.", pattern=QUANTITY)
    data: str = opt("100Gi", "Size of the claim for /data.", pattern=QUANTITY)
    models: str = opt("100Gi", "Size of the claim for /models.", pattern=QUANTITY)
    cache: str = opt("100Gi", "Size of the claim for /cache: Hugging Face's files, and token shards.", pattern=QUANTITY)
    claims: dict[Literal["runs", "data", "models", "cache"], str] = opt(
        {}, "Claims that exist already, by volume: {data: team-data}."
    )
    storage_class: str | None = opt(None, "Storage class of new claims; the cluster's default when not given.")
    access_mode: Literal["ReadWriteMany", "ReadWriteOnce"] = opt(
        "ReadWriteMany", "Access mode of new claims; ReadWriteOnce is for clusters of one machine."
    )
    host_path: str | None = opt(
        None,
        "Folder of the cluster's only machine that holds the volumes, in place of claims; needs pod_security "
        "privileged.",
        pattern="^/",
    )

    @property
    def sizes(self) -> dict[str, str]:
        """Size of each volume."""
        return {"runs": self.runs, "data": self.data, "models": self.models, "cache": self.cache}


class KubernetesConfig(Section):
    """Settings of `launch k8s`."""

    image: str = opt("llmtrain:local", "Image of the pods.", min_length=1)
    namespace: str | None = opt(None, "Namespace; kubectl's current one when not given.", min_length=1)
    pod_security: Literal["restricted", "privileged"] = opt(
        "restricted",
        "privileged makes a namespace of its own for RDMA or storage.host_path, which restricted Pod Security forbids.",
    )
    kind: Literal["job", "jobset", "statefulset"] = opt(
        "job",
        "job: an Indexed Job; jobset: a JobSet, which must be installed; statefulset: pods that stay and start again.",
    )
    nodes: int = opt(1, "Number of pods.", ge=1)
    gpus_per_node: int | None = opt(
        None, "GPUs, and so processes, of each pod; 1 when not given, and 0 with run.device: cpu.", ge=0
    )
    gpu_resource: str = opt("nvidia.com/gpu", "Name by which the cluster counts GPUs.", min_length=1)
    cpu: str = opt("4", "Processor cores that each pod requests.", pattern=QUANTITY)
    memory: str = opt("32Gi", "Memory of each pod.", pattern=QUANTITY)
    shared_memory: str = opt("8Gi", "Size of /dev/shm, which counts as memory of the pod.", pattern=QUANTITY)
    scratch: str = opt("20Gi", "Disk of each pod for /tmp and its log.", pattern=QUANTITY)
    storage: StorageConfig = StorageConfig()
    env_from: str = opt(
        "llmtrain",
        "Secret whose keys become environment variables (HF_TOKEN, WANDB_API_KEY, …) and files in "
        "/run/secrets/llmtrain; it may be absent.",
        min_length=1,
    )
    env: dict[str, str] = opt({}, "Environment variables of the pods; secrets belong into the Secret of `env_from`.")
    node_selector: dict[str, str] = opt({}, "Labels that a node must have.")
    tolerations: list[Annotated[str, Field(pattern=TAINT)]] = opt(
        [], "Taints that the pods tolerate beside the GPU's: key, key:NoSchedule or key=value:NoSchedule."
    )
    spread: Literal["preferred", "required"] = opt(
        "preferred", "Whether the pods should or must run on different nodes."
    )
    priority_class: str | None = opt(None, "Priority class of the pods.", min_length=1)
    queue: str | None = opt(None, "Local queue of Kueue, which then decides when the run starts.", min_length=1)
    gang_scheduling: Literal["v1alpha2", "v1beta1"] | None = opt(
        None,
        "Schedule all pods of a job or none: the version of scheduling.k8s.io that the cluster has switched on, "
        "v1alpha2 on Kubernetes 1.36 and v1beta1 on 1.37.",
    )
    rdma: str | None = opt(
        None,
        "Resource that gives a pod its RDMA adapters, such as rdma/ib; needs pod_security privileged.",
        pattern=r"^[^/]+/[^/]+$",
    )
    offline: bool = opt(False, "Let the pods reach nothing outside; models and data must lie on the volumes.")
    egress_ports: list[int] = opt([443], "TCP ports that the pods may reach outside the cluster.")
    mlflow: bool = opt(False, "Log to the MLflow server of the same namespace, http://mlflow:5000.")
    retries: int = opt(3, "How often the run starts again after failures that count (exit codes 1 and 76).", ge=0)
    shutdown_sec: int = opt(
        150, "Seconds that a stopped run may take to save; the pods' grace period is 30 seconds longer.", ge=10
    )
    startup_minutes: int = opt(
        120, "Minutes from the start of a pod to the first step, with fetching models and preparing data.", ge=1
    )
    deadline_hours: int = opt(168, "Hours after which a Job is ended.", ge=1)
    keep_hours: int = opt(24, "Hours for which a finished Job stays.", ge=0)
