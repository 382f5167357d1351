"""The template of a run's pods: command, environment, volumes, probes, placement and security."""

from __future__ import annotations

from typing import Any, Final

from llmtrain.config.sections.kubernetes import VOLUMES, KubernetesConfig
from llmtrain.distributed.launch import OWN_STORE, SHUTDOWN_TIMEOUT
from llmtrain.launching.kubernetes.launch import PORT, ClusterRun, Document

CONTAINER: Final = "trainer"
CONFIG_FOLDER: Final = "/etc/llmtrain"
SECRETS_FOLDER: Final = "/run/secrets/llmtrain"
SERVICE_ACCOUNT: Final = "llmtrain"
USER: Final = 1000
GRACE_SEC: Final = 30
"""Time between the end of the run's own shutdown timeout and the kubelet's SIGKILL."""
STARTUP_PERIOD_SEC: Final = 15
LIVENESS_PERIOD_SEC: Final = 60
SECRET_MODE: Final = 0o440

INDEX_FIELDS: Final = {
    "job": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    "jobset": "metadata.annotations['batch.kubernetes.io/job-completion-index']",
    "statefulset": "metadata.labels['apps.kubernetes.io/pod-index']",
}
"""Field of a pod that has its number, by kind of workload."""


def pod_template(run: ClusterRun) -> Document:
    """Return the template of the run's pods."""
    settings = run.settings
    spec: Document = {
        "restartPolicy": "Always" if settings.kind == "statefulset" else "Never",
        "serviceAccountName": SERVICE_ACCOUNT,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": settings.shutdown_sec + GRACE_SEC,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER,
            "runAsGroup": USER,
            "fsGroup": USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        **_placement(run),
        "containers": [_container(run)],
        "volumes": _volumes(run),
    }
    if settings.kind == "job":  # the other kinds set it themselves
        spec["subdomain"] = run.name
    if settings.gang_scheduling:
        spec["schedulingGroup"] = {"podGroupName": run.name}
    return {"metadata": {"labels": dict(run.labels)}, "spec": spec}


def _container(run: ClusterRun) -> Document:
    settings = run.settings
    return {
        "name": CONTAINER,
        "image": settings.image,
        "imagePullPolicy": "IfNotPresent",
        "command": command(run),
        "workingDir": "/",  # so that data/… and models/… of a config are on the volumes
        "env": _environment(run),
        "envFrom": [{"secretRef": {"name": settings.env_from, "optional": True}}],
        "ports": [{"name": "rendezvous", "containerPort": PORT}],
        "resources": _resources(run),
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"], **({"add": ["IPC_LOCK"]} if settings.rdma else {})},
        },
        "startupProbe": _probe(
            run,
            "--started",
            periodSeconds=STARTUP_PERIOD_SEC,
            failureThreshold=-(-settings.startup_minutes * 60 // STARTUP_PERIOD_SEC),
        ),
        "livenessProbe": _probe(run, "--progress", periodSeconds=LIVENESS_PERIOD_SEC, failureThreshold=3),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": _mounts(),
    }


def command(run: ClusterRun) -> list[str]:
    """Return the command of every pod. The kubelet replaces $(NODE_RANK) by the pod's number."""
    words = [*run.overrides, *(["tracking.mlflow.enabled=true"] if run.settings.mlflow else [])]
    words += ["output.root_dir=/runs", f"output.run_id={run.name}"]
    processes: list[str] = []
    if run.settings.nodes * run.processes > 1:
        processes = [f"--nproc={run.processes}"]
    if run.settings.nodes > 1:
        meeting = f"--rendezvous={run.first_host}:{PORT}"
        processes += [f"--nnodes={run.settings.nodes}", "--node-rank=$(NODE_RANK)", meeting]
    config = f"{CONFIG_FOLDER}/{run.config_file}"
    return ["llmtrain", "train", config, *(word.replace("$(", "$$(") for word in words), "--resume=auto", *processes]


def _environment(run: ClusterRun) -> list[Document]:
    settings = run.settings
    variables = {
        "HOME": "/cache",
        "HF_HOME": "/cache/huggingface",
        "USER": "llmtrain",
        "TMPDIR": "/tmp",
        "TORCHINDUCTOR_CACHE_DIR": "/tmp/torchinductor",
        "TRITON_CACHE_DIR": "/tmp/triton",
        "PYTHONDONTWRITEBYTECODE": "1",
        SHUTDOWN_TIMEOUT: str(settings.shutdown_sec),
        OWN_STORE: "1",
    }
    if settings.nodes > 1:  # an option of torchrun: pods come up minutes apart, when nodes are added or images fetched
        variables["PET_RDZV_CONF"] = f"timeout={settings.startup_minutes * 60}"
    if run.gpus:
        variables |= {"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "0" if settings.rdma else "1"}
    if settings.offline:
        variables |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if settings.mlflow:
        variables["MLFLOW_TRACKING_URI"] = "http://mlflow:5000"
    variables |= {name: value.replace("$(", "$$(") for name, value in settings.env.items()}
    rank = {"fieldRef": {"fieldPath": INDEX_FIELDS[settings.kind]}}
    return [
        {"name": "NODE_RANK", "valueFrom": rank},
        *({"name": name, "value": value} for name, value in variables.items()),
    ]


def _resources(run: ClusterRun) -> dict[str, Any]:
    settings = run.settings
    limits = {"memory": settings.memory, "ephemeral-storage": settings.scratch}
    if run.gpus:
        limits[settings.gpu_resource] = str(run.gpus)
    if settings.rdma:
        limits[settings.rdma] = "1"
    return {"requests": {"cpu": settings.cpu, **limits}, "limits": limits}


def _probe(run: ClusterRun, question: str, **numbers: int) -> Document:
    health = ["llmtrain", "health", run.name, question, "--root-dir=/runs"]
    return {"exec": {"command": health}, "timeoutSeconds": 30, **numbers}


def _mounts() -> list[Document]:
    paths = {"shm": "/dev/shm", "tmp": "/tmp", **{name: f"/{name}" for name in VOLUMES}}
    return [
        *({"name": name, "mountPath": path} for name, path in paths.items()),
        {"name": "config", "mountPath": CONFIG_FOLDER, "readOnly": True},
        {"name": "secrets", "mountPath": SECRETS_FOLDER, "readOnly": True},
    ]


def _volumes(run: ClusterRun) -> list[Document]:
    settings, storage = run.settings, run.settings.storage
    shared: list[Document] = []
    for name in VOLUMES:
        if storage.host_path:
            source: Document = {"hostPath": {"path": f"{storage.host_path}/{name}", "type": "DirectoryOrCreate"}}
        else:
            source = {"persistentVolumeClaim": {"claimName": claim_name(settings, name)}}
        shared.append({"name": name, **source})
    return [
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": settings.shared_memory}},
        {"name": "tmp", "emptyDir": {"sizeLimit": settings.scratch}},
        *shared,
        {"name": "config", "configMap": {"name": run.name}},
        {
            "name": "secrets",
            "secret": {"secretName": settings.env_from, "defaultMode": SECRET_MODE, "optional": True},
        },
    ]


def claim_name(settings: KubernetesConfig, volume: str) -> str:
    """Return the name of a volume's claim: the existing one from the config, or the one that we make."""
    return dict[str, str](settings.storage.claims.items()).get(volume, f"llmtrain-{volume}")


def _placement(run: ClusterRun) -> Document:
    settings = run.settings
    selector = {"matchLabels": run.selector}
    term = {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}
    required = settings.spread == "required"
    apart: Document = (
        {"requiredDuringSchedulingIgnoredDuringExecution": [term]}
        if required
        else {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "podAffinityTerm": term}]}
    )
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule" if required else "ScheduleAnyway",
        "labelSelector": selector,
    }
    taints = [f"{settings.gpu_resource}:NoSchedule"] * bool(run.gpus) + settings.tolerations
    placement: Document = {
        "affinity": {"podAntiAffinity": apart},
        "topologySpreadConstraints": [spread],
        "tolerations": [_toleration(taint) for taint in taints],
    }
    if settings.node_selector:
        placement["nodeSelector"] = dict(settings.node_selector)
    if settings.priority_class:
        placement["priorityClassName"] = settings.priority_class
    return placement


def _toleration(taint: str) -> Document:
    """Return the toleration of a taint in kubectl's notation: key, key:Effect or key=value:Effect."""
    rest, colon, effect = taint.partition(":")
    key, equals, value = rest.partition("=")
    toleration = {"key": key, "operator": "Equal", "value": value} if equals else {"key": key, "operator": "Exists"}
    return {**toleration, **({"effect": effect} if colon else {})}
