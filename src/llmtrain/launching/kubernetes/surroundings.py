"""Renders the objects that a run needs besides its workload: Service, ConfigMap, volumes, network and drain rules."""

from __future__ import annotations

from llmtrain.launching.kubernetes.launch import PORT, ClusterRun, Document
from llmtrain.launching.kubernetes.pod import SERVICE_ACCOUNT, claim_name

METADATA_SERVERS = ["169.254.0.0/16"]
"""Addresses at which clouds give any process the machine's credentials."""


def surroundings(run: ClusterRun) -> list[Document]:
    """Return all objects of the run except its workload, in the order of their creation."""
    settings = run.settings
    documents = [_namespace(run)] if settings.pod_security == "privileged" else []
    documents += [
        {
            "apiVersion": "v1",
            "kind": "ServiceAccount",
            "metadata": {"name": SERVICE_ACCOUNT, "labels": _shared(run)},
            "automountServiceAccountToken": False,
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": _metadata(run),
            "data": {run.config_file: run.config_text},
        },
        *_claims(run),
    ]
    if settings.kind != "jobset":
        documents.append(_service(run))
    documents += [_network_policy(run), _disruption_budget(run)]
    if settings.gang_scheduling:
        documents.append(_pod_group(run))
    return documents


def _metadata(run: ClusterRun) -> Document:
    return {"name": run.name, "labels": dict(run.labels)}


def _shared(run: ClusterRun) -> dict[str, str]:
    """Return the labels of objects that all runs of the namespace share."""
    return {name: value for name, value in run.labels.items() if name not in run.selector}


def _namespace(run: ClusterRun) -> Document:
    assert run.settings.namespace is not None
    labels = {"pod-security.kubernetes.io/enforce": run.settings.pod_security}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": run.settings.namespace, "labels": labels}}


def _claims(run: ClusterRun) -> list[Document]:
    storage = run.settings.storage
    if storage.host_path:
        return []
    storage_class = {"storageClassName": storage.storage_class} if storage.storage_class else {}
    return [
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": claim_name(run.settings, volume), "labels": _shared(run)},
            "spec": {
                "accessModes": [storage.access_mode],
                **storage_class,
                "resources": {"requests": {"storage": size}},
            },
        }
        for volume, size in storage.sizes.items()
        if volume not in storage.claims
    ]


def _service(run: ClusterRun) -> Document:
    """Return the headless Service, which gives each pod a host name even before it is ready."""
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": _metadata(run),
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": dict(run.selector),
            "ports": [{"name": "rendezvous", "port": PORT}],
        },
    }


def _network_policy(run: ClusterRun) -> Document:
    """Allow the pods to reach each other, DNS, MLflow if it is used, and some ports outside of the cluster."""
    settings = run.settings
    peers = {"podSelector": {"matchLabels": run.selector}}
    dns = [{"protocol": protocol, "port": 53} for protocol in ("UDP", "TCP")]
    system = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}}}
    egress: list[Document] = [{"to": [peers]}, {"to": [system], "ports": dns}]
    if settings.mlflow:
        mlflow = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "mlflow"}}}
        egress.append({"to": [mlflow], "ports": [{"protocol": "TCP", "port": 5000}]})
    if settings.egress_ports and not settings.offline:
        anywhere: list[Document] = [{"ipBlock": {"cidr": "0.0.0.0/0", "except": METADATA_SERVERS}}]
        anywhere.append({"ipBlock": {"cidr": "::/0"}})
        egress.append({"to": anywhere, "ports": [{"protocol": "TCP", "port": port} for port in settings.egress_ports]})
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": _metadata(run),
        "spec": {
            "podSelector": {"matchLabels": run.selector},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": [peers]}],
            "egress": egress,
        },
    }


def _disruption_budget(run: ClusterRun) -> Document:
    """Return a budget that lets no pod be drained, since all pods would stop."""
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": _metadata(run),
        "spec": {
            "minAvailable": run.settings.nodes,
            "selector": {"matchLabels": run.selector},
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }


def _pod_group(run: ClusterRun) -> Document:
    return {
        "apiVersion": f"scheduling.k8s.io/{run.settings.gang_scheduling}",
        "kind": "PodGroup",
        "metadata": _metadata(run),
        "spec": {"schedulingPolicy": {"gang": {"minCount": run.settings.nodes}}},
    }
