"""Finds faults that a schema accepts but a cluster rejects or never runs, before anything is submitted.

It reads plain documents, so it checks a kustomize overlay as well as the result of `render`. Each fault has its fix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, NamedTuple

from llmtrain.distributed.launch import SHUTDOWN_SECONDS, SHUTDOWN_TIMEOUT
from llmtrain.launching.kubernetes.launch import LABEL, MAX_LABEL, Document, host_name
from llmtrain.launching.kubernetes.pod_security import violations
from llmtrain.screen import counted
from llmtrain.tracking.redaction import is_secret_name

MAX_CONFIG_MAP: Final = 1 << 20
KINDS: Final = {"Job": "job", "JobSet": "jobset", "StatefulSet": "statefulset"}
FOR_INDEPENDENT_INDEXES: Final = ("backoffLimitPerIndex", "maxFailedIndexes", "successPolicy")


class ManifestFault(NamedTuple):
    """A mistake in a document: where, what, and what to do."""

    where: str
    what: str
    fix: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}: {self.fix}"


class Workload(NamedTuple):
    """A workload of one of the three kinds."""

    kind: str
    name: str
    spec: Document
    """Spec of the Job, of the JobSet's Job, or of the StatefulSet: the one that has the pod template."""
    outer: Document
    """The workload's own spec, which differs from `spec` for a JobSet."""

    @property
    def where(self) -> str:
        """Name of the workload in messages."""
        return f"{self.kind}/{self.name}"

    @property
    def pod(self) -> Document:
        """Spec of the pods."""
        spec: Document = self.spec["template"]["spec"]
        return spec

    @property
    def labels(self) -> dict[str, str]:
        """Labels of the pods, including those that the controller adds."""
        own = self.spec["template"].get("metadata", {}).get("labels", {})
        added = {"Job": "batch.kubernetes.io/job-name", "JobSet": "jobset.sigs.k8s.io/jobset-name"}
        return {**own, **({added[self.kind]: self.name} if self.kind in added else {})}

    @property
    def size(self) -> int:
        """Number of pods."""
        return int(self.spec.get("replicas" if self.kind == "StatefulSet" else "completions") or 1)


def check(documents: Sequence[Document]) -> list[ManifestFault]:
    """Return all faults in the documents of a run."""
    checks: tuple[Callable[[Workload, Sequence[Document]], Iterator[ManifestFault]], ...] = (
        _failure_policy,
        _host_names,
        _service,
        _grace_period,
        _pod_security,
        _disruption_budgets,
        _process_group,
        _references,
    )
    workloads = [workload for document in documents if (workload := _workload(document))]
    found = [finding for document in documents for finding in _document(document)]
    found += [finding for workload in workloads for one in checks for finding in one(workload, documents)]
    return list(dict.fromkeys(found))


def _workload(document: Document) -> Workload | None:
    if document["kind"] not in KINDS:
        return None
    spec = document["spec"]
    inner = spec["replicatedJobs"][0]["template"]["spec"] if document["kind"] == "JobSet" else spec
    return Workload(document["kind"], document["metadata"]["name"], inner, spec)


def _document(document: Document) -> Iterator[ManifestFault]:
    """Check any document: its name, its labels, its size."""
    where = f"{document['kind']}/{document['metadata']['name']}"
    name = document["metadata"]["name"]
    if len(name) > MAX_LABEL or not LABEL.fullmatch(name):
        rule = f"at most {MAX_LABEL} of a to z, 0 to 9 and -, beginning with a letter"
        yield ManifestFault(where, f"{name!r} is not a valid name", f"use {rule}")
    for label, value in document["metadata"].get("labels", {}).items():
        if len(str(value)) > MAX_LABEL:
            yield ManifestFault(where, f"the label {label} has {len(value)} characters", f"use at most {MAX_LABEL}")
    if document["kind"] == "ConfigMap":
        size = sum(len(text.encode()) for text in document.get("data", {}).values())
        if size > MAX_CONFIG_MAP:
            fix = "move lists out of the config into files on a volume"
            yield ManifestFault(where, f"{counted(size, 'byte')}, but a ConfigMap holds {MAX_CONFIG_MAP:,}", fix)


def _failure_policy(workload: Workload, _: Sequence[Document]) -> Iterator[ManifestFault]:
    restart = workload.pod.get("restartPolicy")
    if workload.kind == "StatefulSet":
        if restart != "Always":
            yield ManifestFault(workload.where, f"restartPolicy is {restart}", "set it to Always, as StatefulSets need")
        return
    if workload.spec.get("podFailurePolicy") and restart != "Never":
        yield ManifestFault(
            workload.where, f"restartPolicy is {restart} beside podFailurePolicy", "set restartPolicy: Never"
        )
    if workload.spec.get("podFailurePolicy") and workload.spec.get("podReplacementPolicy", "Failed") != "Failed":
        fix = "set it to Failed, so that a pod is gone before its successor joins"
        yield ManifestFault(workload.where, "podReplacementPolicy is not Failed", fix)


def _host_names(workload: Workload, _: Sequence[Document]) -> Iterator[ManifestFault]:
    longest = host_name(workload.name, kind=KINDS[workload.kind], index=workload.size - 1)
    if len(longest) > MAX_LABEL:
        fix = f"shorten the run's name by {len(longest) - MAX_LABEL} characters (--name)"
        yield ManifestFault(workload.where, f"the host name {longest} has {len(longest)} characters", fix)


def _service(workload: Workload, documents: Sequence[Document]) -> Iterator[ManifestFault]:
    """Check that the pods have names by which they find each other."""
    if workload.kind == "JobSet":
        if not workload.outer.get("network", {}).get("enableDNSHostnames", True):
            yield ManifestFault(workload.where, "its pods have no host names", "set network.enableDNSHostnames: true")
        return
    is_job = workload.kind == "Job"
    key = "subdomain" if is_job else "serviceName"
    domain = workload.pod.get("subdomain") if is_job else workload.spec.get("serviceName")
    services = [document for document in documents if document["kind"] == "Service"]
    if not domain:
        yield ManifestFault(
            workload.where, f"its pods have no {key}, so no host names", f"set {key} to the Service's name"
        )
        return
    service = next((one for one in services if one["metadata"]["name"] == domain), None)
    if service is None:
        names = ", ".join(one["metadata"]["name"] for one in services) or "none"
        fix = f"give the headless Service and {key} the same name"
        yield ManifestFault(workload.where, f"{key} is {domain}, but the Services are {names}", fix)
        return
    where, spec = f"Service/{domain}", service["spec"]
    selector: dict[str, Any] = spec.get("selector") or {}
    missed = [f"{name}: {value}" for name, value in selector.items() if workload.labels.get(name) != value]
    if missed or not selector:
        fix = "select labels that the pod template has"
        yield ManifestFault(
            where, f"its selector misses the pods of {workload.where} ({', '.join(missed) or 'empty'})", fix
        )
    if spec.get("clusterIP") != "None":
        yield ManifestFault(where, "it is not headless, so pods have no names of their own", "set clusterIP: None")
    if not spec.get("publishNotReadyAddresses"):
        fix = "set publishNotReadyAddresses: true, since pods meet before they are ready"
        yield ManifestFault(where, "it only names pods that are ready", fix)


def _grace_period(workload: Workload, _: Sequence[Document]) -> Iterator[ManifestFault]:
    grace = workload.pod.get("terminationGracePeriodSeconds", 30)
    timeout = _variables(workload).get(SHUTDOWN_TIMEOUT, str(SHUTDOWN_SECONDS))
    if not timeout.isdecimal() or int(timeout) >= grace:
        what = f"terminationGracePeriodSeconds is {grace}, but {SHUTDOWN_TIMEOUT} is {timeout}"
        fix = "raise the first above the second (kubernetes.shutdown_sec sets both), or a save is cut off"
        yield ManifestFault(workload.where, what, fix)
    if any("preStop" in container.get("lifecycle", {}) for container in workload.pod["containers"]):
        yield ManifestFault(workload.where, "a preStop hook takes time from the save", "remove it: SIGTERM is enough")


def _pod_security(workload: Workload, documents: Sequence[Document]) -> Iterator[ManifestFault]:
    levels = [
        document["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
        for document in documents
        if document["kind"] == "Namespace"
    ]
    if "privileged" in levels:
        return
    for what, fix in violations(workload.pod):
        yield ManifestFault(workload.where, f"restricted Pod Security forbids {what}", fix)


def _disruption_budgets(workload: Workload, documents: Sequence[Document]) -> Iterator[ManifestFault]:
    for document in documents:
        if document["kind"] != "PodDisruptionBudget":
            continue
        where, spec = f"PodDisruptionBudget/{document['metadata']['name']}", document["spec"]
        selector = spec.get("selector", {}).get("matchLabels", {})
        if any(workload.labels.get(name) != value for name, value in selector.items()):
            yield ManifestFault(
                where, f"its selector misses the pods of {workload.where}", "select labels of the template"
            )
        if workload.kind == "StatefulSet":
            continue
        least = spec.get("minAvailable")
        if "maxUnavailable" in spec or not isinstance(least, int):
            given = "maxUnavailable" if "maxUnavailable" in spec else f"minAvailable {least}"
            fix = f"set minAvailable: {workload.size}, an integer"
            yield ManifestFault(where, f"{given} cannot be computed for the pods of a {workload.kind}", fix)


def _process_group(workload: Workload, _: Sequence[Document]) -> Iterator[ManifestFault]:
    """Check that the pods run at the same time, as one process group."""
    if workload.kind == "StatefulSet":
        if workload.spec.get("podManagementPolicy") != "Parallel":
            fix = "set podManagementPolicy: Parallel"
            yield ManifestFault(
                workload.where, "each pod waits until the one before is ready, which needs all of them", fix
            )
        return
    for key in FOR_INDEPENDENT_INDEXES:
        if key in workload.spec:
            yield ManifestFault(workload.where, f"{key} is for pods that are independent of each other", "remove it")
    if workload.spec.get("completionMode") != "Indexed":
        yield ManifestFault(workload.where, "its pods have no number", "set completionMode: Indexed")
    if workload.spec.get("parallelism") != workload.spec.get("completions"):
        what = f"parallelism is {workload.spec.get('parallelism')}, but completions {workload.spec.get('completions')}"
        yield ManifestFault(workload.where, what, "make them equal: all pods run at the same time")


def _references(workload: Workload, documents: Sequence[Document]) -> Iterator[ManifestFault]:
    """Check what the pods refer to: the ConfigMap, Secrets, variables, devices."""
    maps = {document["metadata"]["name"] for document in documents if document["kind"] == "ConfigMap"}
    for volume in workload.pod.get("volumes", []):
        name = volume.get("configMap", {}).get("name")
        if name is not None and name not in maps:
            yield ManifestFault(workload.where, f"there is no ConfigMap {name}", "name the one that holds the config")
        mode = volume.get("secret", {}).get("defaultMode", 0o440)
        if mode & 0o337:
            fix = "set defaultMode: 288, which is 0440"
            yield ManifestFault(workload.where, f"files of the secret {volume['name']} have mode 0{mode:o}", fix)
    for variable in _variables(workload):
        if is_secret_name(variable):
            fix = "put it into a Secret, and refer to that"
            yield ManifestFault(workload.where, f"the value of {variable} can be read in the pod's description", fix)
    for container in workload.pod["containers"]:
        resources = container.get("resources", {})
        limits, requests = resources.get("limits", {}), resources.get("requests", {})
        for resource in {*limits, *requests}:
            if "/" in resource and requests.get(resource, limits.get(resource)) != limits.get(resource):
                what = f"{resource} is requested {requests.get(resource)} times, but limited to {limits.get(resource)}"
                yield ManifestFault(workload.where, what, "make them equal: devices are not shared")


def _variables(workload: Workload) -> dict[str, str]:
    """Return the containers' variables whose values are in the template itself."""
    containers = workload.pod["containers"]
    return {one["name"]: one["value"] for each in containers for one in each.get("env", []) if "value" in one}
