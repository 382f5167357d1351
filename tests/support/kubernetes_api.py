"""A Kubernetes API server over HTTP: the part that kubectl uses, with objects that a test puts in place.

with cluster(tmp_path, monkeypatch) as api:      kubectl's config leads to it
    api.put("pods", pod(…))
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

NAMESPACE = "default"
GROUPS: dict[str, dict[str, str]] = {
    "v1": {
        "pods": "Pod",
        "services": "Service",
        "configmaps": "ConfigMap",
        "serviceaccounts": "ServiceAccount",
        "persistentvolumeclaims": "PersistentVolumeClaim",
        "events": "Event",
    },
    "batch/v1": {"jobs": "Job"},
    "apps/v1": {"statefulsets": "StatefulSet"},
    "policy/v1": {"poddisruptionbudgets": "PodDisruptionBudget"},
    "networking.k8s.io/v1": {"networkpolicies": "NetworkPolicy"},
}
"""Resources and their kinds, by API version. There is no JobSet, as on most clusters."""


class FakeCluster:
    """Objects by resource and name, the logs of pods, and all requests that changed something."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.logs: dict[str, str] = {}
        self.changes: list[tuple[str, str]] = []
        """Method and `resource/name`."""
        self.on_read: Callable[[], object] = lambda: None
        """Called before pods are listed: time passes on the cluster."""

    def put(self, resource: str, document: dict[str, Any]) -> None:
        """Put an object in place."""
        document.setdefault("apiVersion", next(version for version, each in GROUPS.items() if resource in each))
        document.setdefault("kind", next(each[resource] for each in GROUPS.values() if resource in each))
        document["metadata"].setdefault("namespace", NAMESPACE)
        self.objects[resource, document["metadata"]["name"]] = document

    def of(self, resource: str) -> list[dict[str, Any]]:
        """Return the objects of a resource."""
        return [document for (kind, _), document in self.objects.items() if kind == resource]

    def drop(self, resource: str) -> None:
        """Remove all objects of a resource."""
        self.objects = {key: document for key, document in self.objects.items() if key[0] != resource}

    def end(self, name: str, condition: str, *, message: str = "", reason: str = "") -> None:
        """Let a Job end."""
        about = {"type": condition, "status": "True", "message": message, "reason": reason}
        self.objects["jobs", name]["status"] = {"conditions": [about]}


def pod(run: str, index: int, phase: str = "Running", *, number: int = 0, **status: Any) -> dict[str, Any]:
    """A pod of a run; later pods of the same index have a higher `number`. `status`: of the trainer or the pod."""
    state = {name: status.pop(name) for name in ("running", "waiting", "terminated") if name in status}
    if not state and phase == "Running":
        state = {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
    container = [{"name": "trainer", "state": state}] if state else []
    return {
        "metadata": {
            "name": f"{run}-{index}-{number}",
            "labels": {"app.kubernetes.io/instance": run, "batch.kubernetes.io/job-completion-index": str(index)},
            "creationTimestamp": f"2026-01-01T00:00:{number:02}Z",
        },
        "spec": {"containers": [{"name": "trainer", "image": "x"}]},
        "status": {"phase": phase, "containerStatuses": container, **status},
    }


@contextmanager
def cluster(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """Serve a cluster, and lead kubectl to it."""
    api = FakeCluster()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"api": api}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{server.server_port}"}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    monkeypatch.setenv("KUBECONFIG", str(folder / "kubeconfig"))
    monkeypatch.setenv("HOME", str(folder))
    try:
        yield api
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    api: FakeCluster
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, query = self._path()
        if path == ["api"]:
            return self._send({"kind": "APIVersions", "versions": ["v1"]})
        if path == ["apis"]:
            return self._send({"kind": "APIGroupList", "apiVersion": "v1", "groups": _groups()})
        version = "v1" if path[0] == "api" else "/".join(path[1:3])
        rest = path[2:] if path[0] == "api" else path[3:]
        if version not in GROUPS:
            return self._missing("path")
        if not rest:
            return self._send(_resources(version))
        resource, name, *part = [*rest[2:], None, None][:3] if rest[0] == "namespaces" else [*rest, None, None][:3]
        if part == ["log"]:
            return self._send_text(self.api.logs.get(str(name), ""))
        if resource == "pods" and name is None:
            self.api.on_read()
        if name is not None:
            found = self.api.objects.get((str(resource), str(name)))
            return self._send(found) if found else self._missing(f"{resource} {name!r}")
        wanted = [pair.split("=", 1) for each in query.get("labelSelector", []) for pair in each.split(",") if pair]
        fields = [pair.split("=", 1) for each in query.get("fieldSelector", []) for pair in each.split(",") if pair]
        items = [
            document
            for document in self.api.of(str(resource))
            if all(document["metadata"].get("labels", {}).get(label) == value for label, value in wanted)
            and all(_field(document, field) == value for field, value in fields)
        ]
        kind = GROUPS[version][str(resource)]
        return self._send({"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items})

    def do_PATCH(self) -> None:
        path, _ = self._path()
        document = yaml.safe_load(self._body())
        self.api.changes.append(("PATCH", f"{path[-2]}/{path[-1]}"))
        self.api.put(path[-2], document)
        self._send(document)

    def do_DELETE(self) -> None:
        path, _ = self._path()
        self._body()
        self.api.changes.append(("DELETE", f"{path[-2]}/{path[-1]}"))
        found = self.api.objects.pop((path[-2], path[-1]), None)
        if found is None:
            return self._missing(path[-1])
        return self._send({"kind": "Status", "apiVersion": "v1", "status": "Success", "metadata": {}})

    def _path(self) -> tuple[list[str], dict[str, list[str]]]:
        parts = urlsplit(self.path)
        return [part for part in parts.path.split("/") if part], parse_qs(parts.query)

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _missing(self, what: str) -> None:
        message = f"{what} not found"
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
        self._send({**status, "message": message, "metadata": {}}, code=404)

    def _send(self, document: Any, *, code: int = 200) -> None:
        self._send_text(json.dumps(document), code=code, kind="application/json")

    def _send_text(self, text: str, *, code: int = 200, kind: str = "text/plain") -> None:
        body = text.encode()
        self.send_response(code)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


def _groups() -> list[dict[str, Any]]:
    groups = []
    for version in GROUPS:
        name, slash, number = version.partition("/")
        if slash:
            one = {"groupVersion": version, "version": number}
            groups.append({"name": name, "versions": [one], "preferredVersion": one})
    return groups


def _resources(version: str) -> dict[str, Any]:
    verbs = ["get", "list", "patch", "delete", "create"]
    each = [
        {"name": name, "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
        for name, kind in GROUPS[version].items()
    ]
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": each}


def _field(document: Any, path: str) -> Any:
    for part in path.split("."):
        document = document.get(part, {})
    return document
