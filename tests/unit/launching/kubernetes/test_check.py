"""The check before submission: everything that a schema accepts and a cluster rejects, each with its fix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.launching.kubernetes.check import check
from llmtrain.launching.kubernetes.pod_security import violations
from llmtrain.launching.kubernetes.render import render
from llmtrain.verbs.launch_k8s import cluster_run

Documents = list[dict[str, Any]]
Change = Callable[[Documents], object]


def documents_of(*words: str) -> Documents:
    return render(cluster_run(load_config("quickstart", words), words, name="one", env={}))


def of_kind(documents: Documents, kind: str) -> dict[str, Any]:
    return next(document for document in documents if document["kind"] == kind)


def job(documents: Documents) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(documents, "Job")["spec"]
    return spec


def pod(documents: Documents) -> dict[str, Any]:
    spec: dict[str, Any] = job(documents)["template"]["spec"]
    return spec


def trainer(documents: Documents) -> dict[str, Any]:
    container: dict[str, Any] = pod(documents)["containers"][0]
    return container


def put(place: Callable[[Documents], dict[str, Any]], **values: Any) -> Change:
    """A change that puts values into a part of the documents; None takes a key away."""

    def change(documents: Documents) -> None:
        part = place(documents)
        for key, value in values.items():
            if value is None:
                part.pop(key, None)
            else:
                part[key] = value

    return change


def spec_of(kind: str) -> Callable[[Documents], dict[str, Any]]:
    return lambda documents: dict.__getitem__(of_kind(documents, kind), "spec")


def rename_job(documents: Documents) -> None:
    of_kind(documents, "Job")["metadata"]["name"] = "a" * 62


def no_service(documents: Documents) -> None:
    documents.remove(of_kind(documents, "Service"))


def variable(name: str, value: str) -> Change:
    def change(documents: Documents) -> None:
        trainer(documents)["env"] = [{"name": name, "value": value}]

    return change


MISTAKES: dict[str, tuple[Change, str, str]] = {
    "restart policy": (
        put(pod, restartPolicy="OnFailure"),
        "restartPolicy is OnFailure beside",
        "restartPolicy: Never",
    ),
    "replacement": (put(job, podReplacementPolicy="TerminatingOrFailed"), "podReplacementPolicy", "set it to Failed"),
    "host name": (rename_job, "has 64 characters", "shorten the run's name by 1"),
    "name": (
        lambda d: of_kind(d, "Service")["metadata"].update(name="A_b"),
        "'A_b' is not a valid name",
        "use at most 63",
    ),
    "label": (lambda d: d[-1]["metadata"]["labels"].update(x="y" * 64), "label x has 64", "at most 63"),
    "no service": (no_service, "subdomain is one, but the Services are none", "the same name"),
    "subdomain": (put(pod, subdomain="two"), "subdomain is two, but the Services are one", "the same name"),
    "no subdomain": (put(pod, subdomain=None), "no subdomain", "set subdomain"),
    "selector": (put(spec_of("Service"), selector={"a": "b"}), "misses the pods of Job/one (a: b)", "select labels"),
    "empty selector": (put(spec_of("Service"), selector=None), "misses the pods of Job/one (empty)", "select labels"),
    "headless": (put(spec_of("Service"), clusterIP=None), "not headless", "clusterIP: None"),
    "not ready": (
        put(spec_of("Service"), publishNotReadyAddresses=None),
        "only names pods that are ready",
        "publishNotReady",
    ),
    "grace": (
        put(pod, terminationGracePeriodSeconds=150),
        "is 150, but TORCH_ELASTIC_SHUTDOWN_TIMEOUT is 150",
        "raise",
    ),
    "default grace": (put(pod, terminationGracePeriodSeconds=None), "terminationGracePeriodSeconds is 30", "raise"),
    "default timeout": (put(trainer, env=[]), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT is 600", "raise"),
    "preStop": (put(trainer, lifecycle={"preStop": {"sleep": {"seconds": 5}}}), "preStop", "SIGTERM is enough"),
    "budget": (put(spec_of("PodDisruptionBudget"), minAvailable=None, maxUnavailable=0), "maxUnavailable", "integer"),
    "share": (put(spec_of("PodDisruptionBudget"), minAvailable="50%"), "minAvailable 50%", "minAvailable: 2"),
    "budget of others": (
        put(spec_of("PodDisruptionBudget"), selector={"matchLabels": {"a": "b"}}),
        "misses the pods",
        "labels of the template",
    ),
    "per index": (put(job, backoffLimitPerIndex=1), "backoffLimitPerIndex is for pods", "remove it"),
    "failed indexes": (put(job, maxFailedIndexes=1), "maxFailedIndexes is for pods", "remove it"),
    "success": (put(job, successPolicy={"rules": []}), "successPolicy is for pods", "remove it"),
    "mode": (put(job, completionMode="NonIndexed"), "no number", "completionMode: Indexed"),
    "parallelism": (put(job, parallelism=1), "parallelism is 1, but completions 2", "make them equal"),
    "config map": (lambda d: d.remove(of_kind(d, "ConfigMap")), "no ConfigMap one", "name the one"),
    "large config": (lambda d: of_kind(d, "ConfigMap").update(data={"a": "x" * (1 << 21)}), "2,097,152 bytes", "move"),
    "secret": (variable("HF_TOKEN", "x"), "the value of HF_TOKEN", "put it into a Secret"),
    "gpus": (
        put(trainer, resources={"limits": {"nvidia.com/gpu": "1"}, "requests": {"nvidia.com/gpu": "2"}}),
        "nvidia.com/gpu is requested 2 times, but limited to 1",
        "make them equal",
    ),
    "secret files": (
        lambda d: pod(d)["volumes"].append({"name": "s", "secret": {"secretName": "s", "defaultMode": 0o644}}),
        "have mode 0644",
        "288",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_with_its_fix(mistake: str) -> None:
    change, what, fix = MISTAKES[mistake]
    documents = documents_of("kubernetes.nodes=2")
    assert check(documents) == []
    change(documents)
    found = check(documents)
    assert any(what in str(finding) and fix in finding.fix for finding in found), found


FORBIDDEN: dict[str, tuple[Change, str]] = {
    "host network": (put(pod, hostNetwork=True), "hostNetwork"),
    "host process ids": (put(pod, hostPID=True), "hostPID"),
    "host path": (lambda d: pod(d)["volumes"].append({"name": "h", "hostPath": {"path": "/"}}), "type hostPath"),
    "nfs": (lambda d: pod(d)["volumes"].append({"name": "h", "nfs": {"server": "a", "path": "/"}}), "type nfs"),
    "root": (put(lambda d: pod(d)["securityContext"], runAsUser=0), "user 0"),
    "root of the image": (put(lambda d: pod(d)["securityContext"], runAsNonRoot=None), "run as root"),
    "root again": (put(lambda d: trainer(d)["securityContext"], runAsNonRoot=False), "run as root"),
    "seccomp": (put(lambda d: pod(d)["securityContext"], seccompProfile=None), "without a seccomp profile"),
    "unconfined": (
        put(lambda d: trainer(d)["securityContext"], seccompProfile={"type": "Unconfined"}),
        "without seccomp",
    ),
    "escalation": (put(lambda d: trainer(d)["securityContext"], allowPrivilegeEscalation=None), "gain privileges"),
    "privileged": (put(lambda d: trainer(d)["securityContext"], privileged=True), "to be privileged"),
    "capabilities": (put(lambda d: trainer(d)["securityContext"], capabilities=None), "keep capabilities"),
    "RDMA": (
        put(lambda d: trainer(d)["securityContext"], capabilities={"drop": ["ALL"], "add": ["IPC_LOCK"]}),
        "capability IPC_LOCK",
    ),
    "sysctl": (put(lambda d: pod(d)["securityContext"], sysctls=[{"name": "kernel.msgmax", "value": "1"}]), "sysctl"),
    "proc mount": (put(lambda d: trainer(d)["securityContext"], procMount="Unmasked"), "procMount"),
    "SELinux": (put(lambda d: pod(d)["securityContext"], seLinuxOptions={"type": "spc_t"}), "seLinuxOptions"),
    "AppArmor": (put(lambda d: pod(d)["securityContext"], appArmorProfile={"type": "Unconfined"}), "AppArmor"),
    "host port": (put(trainer, ports=[{"containerPort": 1, "hostPort": 1}]), "host's port 1"),
    "no security": (put(trainer, securityContext=None), "gain privileges"),
    "init container": (put(pod, initContainers=[{"name": "first"}]), "container first to gain privileges"),
    "other host": (put(trainer, livenessProbe={"httpGet": {"host": "a", "port": 1}}), "probe another host"),
}


@pytest.mark.parametrize("mistake", FORBIDDEN)
def test_faults_under_restricted_pod_security_are_found(mistake: str) -> None:
    change, what = FORBIDDEN[mistake]
    documents = documents_of()
    change(documents)
    found = [str(finding) for finding in check(documents)]
    assert any("restricted Pod Security forbids" in line and what in line for line in found)


def test_a_container_may_set_what_its_pod_does_not() -> None:
    safe = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}, "allowPrivilegeEscalation": False}
    safe["capabilities"] = {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}
    assert list(violations({"containers": [{"name": "a", "securityContext": safe}]})) == []


def test_rdma_needs_a_privileged_namespace_of_its_own() -> None:
    words = ["kubernetes.rdma=rdma/ib", "kubernetes.pod_security=privileged", "kubernetes.namespace=own"]
    documents = documents_of(*words)
    assert check(documents) == []
    documents.remove(of_kind(documents, "Namespace"))
    assert any("IPC_LOCK" in finding.what for finding in check(documents))
