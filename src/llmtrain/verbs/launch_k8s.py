"""`launch k8s`: render → check → kubectl apply; and what is asked of a run on a cluster afterwards. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from llmtrain.config.loading.load import LoadedConfig
from llmtrain.config.sections.kubernetes import KubernetesConfig
from llmtrain.config.sections.schema import Config
from llmtrain.distributed.rendezvous import first_machine, reject_identity
from llmtrain.distributed.strategy import reject_what_cannot_run
from llmtrain.errors import ConfigError
from llmtrain.launching.kubernetes.check import check
from llmtrain.launching.kubernetes.follow import PATIENCE_SEC, follow
from llmtrain.launching.kubernetes.kubectl import Kubectl
from llmtrain.launching.kubernetes.launch import PORT, ClusterRun, check_run, name_of
from llmtrain.launching.kubernetes.pod import CONTAINER
from llmtrain.launching.kubernetes.removal import delete_failed, delete_objects, end_pods
from llmtrain.launching.kubernetes.render import render, to_yaml
from llmtrain.launching.kubernetes.watch import INSTANCE, ClusterState, newest_pods, read_state

SECTION: Final = "kubernetes."
"""Keys that the pods need not know, since they describe them."""


def cluster_run(
    loaded: LoadedConfig, overrides: Sequence[str], *, name: str | None, env: Mapping[str, str]
) -> ClusterRun:
    """Return the run of a config on a cluster. Raises ConfigError for what cannot run there."""
    config = loaded.config
    settings: KubernetesConfig = config.kubernetes or KubernetesConfig()
    settings = settings.model_copy(update={"env": {**settings.env, **env}})
    by_device = 0 if config.run.device == "cpu" else 1
    gpus = by_device if settings.gpus_per_node is None else settings.gpus_per_node
    wanted = name or config.output.run_id or config.run.name
    run = ClusterRun(
        name=name_of(wanted, kind=settings.kind, nodes=settings.nodes),
        settings=settings,
        config_text=loaded.as_written,
        config_file="config.json" if loaded.source.endswith(".json") else "config.yaml",
        overrides=[word for word in overrides if not word.startswith(SECTION)],
        gpus=gpus,
    )
    check_run(run)
    _check_agreement(config, run)
    reject_what_cannot_run(config, world_size=run.processes * settings.nodes)
    return run


def _check_agreement(config: Config, run: ClusterRun) -> None:
    """Raise ConfigError where the config's own sections contradict the pods."""
    if run.gpus and config.run.device == "cpu":
        raise ConfigError(f"run.device is cpu, but each pod would hold {run.gpus} GPUs: set kubernetes.gpus_per_node=0")
    if not run.gpus and config.run.device.startswith("cuda"):
        raise ConfigError(f"run.device is {config.run.device}, but pods have no GPU: raise kubernetes.gpus_per_node")
    reject_identity(config.distributed.rendezvous)
    first_machine(config.distributed.rendezvous, option=f"{run.first_host}:{PORT}")


def manifests(run: ClusterRun) -> str:
    """Return the documents of a run as YAML. Raises ConfigError with everything that the cluster would reject."""
    documents = render(run)
    if findings := check(documents):
        raise ConfigError("\n".join(["the cluster would reject this:", *map(str, findings)]))
    return to_yaml(documents)


def submit(run: ClusterRun) -> dict[str, Any]:
    """Start a run on the cluster, or continue one that has ended without being finished."""
    text, kubectl = manifests(run), Kubectl(run.settings.namespace)
    delete_failed(kubectl, run.name)
    return {"run": run.name, "applied": kubectl.apply(text)}


def follow_run(
    name: str, *, namespace: str | None, say: Callable[[str], None], patience_sec: float = PATIENCE_SEC
) -> dict[str, Any]:
    """Return the state of a run at its end; meanwhile its log is printed."""
    return describe(name, follow(Kubectl(namespace), name, say=say, patience_sec=patience_sec))


def status(name: str, *, namespace: str | None) -> dict[str, Any]:
    """Return the state of a run: pods with ranks and causes, step and loss."""
    return describe(name, read_state(Kubectl(namespace), name))


def list_cluster_runs(*, namespace: str | None) -> list[dict[str, Any]]:
    """Return name and kind of each run in the namespace."""
    kubectl, selector = Kubectl(namespace), "--selector=app.kubernetes.io/managed-by=llmtrain"
    found = kubectl.items("jobs,statefulsets", selector)
    jobs = {one["metadata"].get("labels", {}).get(INSTANCE): one["kind"] for one in found}
    return [{"run": run, "kind": kind} for run, kind in jobs.items() if run]


def logs(name: str, *, namespace: str | None, index: int, tail: int | None, follows: bool) -> dict[str, Any]:
    """Return the log of the pod with that number, or print it as it comes. Raises ConfigError if there is none."""
    kubectl = Kubectl(namespace)
    pods = newest_pods(kubectl.items("pods", f"--selector={INSTANCE}={name}"))
    pod = next((pod for pod in pods if pod.index == index), None)
    if pod is None:
        numbers = ", ".join(str(pod.index) for pod in pods)
        raise ConfigError(
            f"the run {name!r} has no pod {index}; " + (f"there are {numbers}" if pods else "it has none")
        )
    options = [f"--container={CONTAINER}", *([f"--tail={tail}"] if tail is not None else [])]
    if follows:
        kubectl.follow_logs(pod.name, *options).wait()
        return {"pod": pod.name}
    return {"pod": pod.name, "log": kubectl.run("logs", pod.name, *options)}


def stop(name: str, *, namespace: str | None) -> dict[str, Any]:
    """End a run's pods with SIGTERM, wait until they have saved and are gone, and return their exit codes."""
    return {"run": name, "exit_codes": end_pods(Kubectl(namespace), name)}


def delete(name: str, *, namespace: str | None) -> dict[str, Any]:
    """Delete everything of a run on the cluster but its volumes, which hold its checkpoints."""
    return {"run": name, "deleted": delete_objects(Kubectl(namespace), name)}


def describe(name: str, state: ClusterState) -> dict[str, Any]:
    """Return a run's state as plain values."""
    pods = [
        {"name": pod.name, "ranks": pod.ranks, "phase": pod.phase, "exit_code": pod.exit_code, "cause": pod.cause}
        for pod in state.pods
    ]
    return {
        **{"run": name, "kind": state.kind, "state": state.state, "step": state.step, "loss": state.loss},
        **{"exit_code": state.exit_code, "cause": state.cause, "pods": pods},
    }
