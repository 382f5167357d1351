"""The part of the Hugging Face Hub's API that is used, on 127.0.0.1: what it would keep, and faults at will.

>>> with LocalHub() as hub:
...     hub.fail("/commit/", status=429, times=1)
...     ...  # HF_ENDPOINT=hub.endpoint HF_TOKEN=hub.TOKEN llmtrain publish …
...     hub.repos["me/model"].files["README.md"]

create · repo info · auth-check · whoami · validate-yaml · tree · preupload · LFS batch and PUT · commit · resolve
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "local" * 5
USER = "me"
LFS_FROM_BYTES = 4096
"""Larger files, and all weights, go through LFS."""


@dataclass
class Repo:
    """What was committed to one repository."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)
    """Their messages, the first one first."""

    @property
    def revision(self) -> str:
        """The newest commit's id."""
        return hashlib.sha1(f"{self.commits}{sorted(self.files)}".encode()).hexdigest()


@dataclass
class _Fault:
    part: str
    status: int | None
    times: int
    headers: Mapping[str, str]


class LocalHub:
    """A Hub with one user, `me`, whose token is TOKEN and who may write to me/… alone."""

    TOKEN = TOKEN

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        """LFS objects by sha256."""
        self.requests: list[str] = []
        """`METHOD path` of each, faults included."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            owner = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """For HF_ENDPOINT."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, part: str, *, status: int | None, times: int = 1, headers: Mapping[str, str] | None = None) -> None:
        """Answer the next `times` requests whose path holds `part` with `status`; None breaks the connection off."""
        self._faults.append(_Fault(part, status, times, headers or {}))

    def heal(self) -> None:
        """No more faults."""
        self._faults.clear()

    def count(self, part: str) -> int:
        """Requests whose `METHOD path` holds `part`."""
        return sum(part in request for request in self.requests)

    def take_fault(self, request: str) -> _Fault | None:
        """The fault that this request is to meet, if any."""
        with self._lock:
            self.requests.append(request)
            for fault in self._faults:
                if fault.times and fault.part in request:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    owner: LocalHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        fault = self.owner.take_fault(f"{self.command} {path}")
        if fault is not None and fault.status is None:
            self.close_connection = True
            self.connection.close()
            return
        if fault is not None:
            assert fault.status is not None
            return self._answer(fault.status, {"error": "as asked for"}, headers=fault.headers)
        if path.startswith("/lfs/"):  # signed addresses need no token
            return self._store(path.rpartition("/")[2], body)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": "Invalid credentials in Authorization header"})
        self._route(path.strip("/").split("/"), body)

    def _route(self, parts: list[str], body: bytes) -> None:
        match parts:
            case ["api", "whoami-v2"]:
                self._answer(200, {"type": "user", "name": USER, "orgs": []})
            case ["api", "validate-yaml"]:
                starts_right = json.loads(body)["content"].startswith("---\nlicense: ")
                self._answer(200 if starts_right else 400, {"errors": [], "warnings": []})
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "models", owner, name, *rest]:
                self._model(f"{owner}/{name}", rest, body)
            case [owner, name, "resolve", revision, *path]:
                self._resolve(f"{owner}/{name}", revision, "/".join(path))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._batch(f"{owner}/{name.removesuffix('.git')}", json.loads(body))
            case _:
                self._answer(404, {"error": "no such page"})

    def _create(self, asked: Mapping[str, Any]) -> None:
        owner = asked.get("organization") or USER
        repo_id = f"{owner}/{asked['name']}"
        if owner != USER:
            return self._answer(403, {"error": f"You don't have the rights to create a model under {owner}"})
        url = f"{self.owner.endpoint}/{repo_id}"
        if repo_id in self.owner.repos:
            return self._answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        self.owner.repos[repo_id] = Repo(private=private)
        self._answer(200, {"url": url, "id": repo_id})

    def _model(self, repo_id: str, rest: list[str], body: bytes) -> None:
        repo = self.owner.repos.get(repo_id)
        if repo is None:
            return self._answer(404, {"error": "Repository not found"}, headers={"X-Error-Code": "RepoNotFound"})
        match rest:
            case ["revision", revision] if revision not in ("main", repo.revision):
                self._answer(404, {"error": "Revision not found"}, headers={"X-Error-Code": "RevisionNotFound"})
            case [] | ["revision", _]:
                files = [{"rfilename": name} for name in repo.files]
                about = {"id": repo_id, "modelId": repo_id, "private": repo.private, "sha": repo.revision, "tags": []}
                self._answer(200, {**about, "siblings": files})
            case ["auth-check", "write"]:
                owns = repo_id.startswith(f"{USER}/")
                self._answer(200 if owns else 403, {} if owns else {"error": "no write access"})
            case ["tree", *_]:
                found = [
                    {"type": "file", "path": name, "size": len(data), "oid": _git_oid(data)}
                    for name, data in repo.files.items()
                ]
                self._answer(200, found)
            case ["preupload", _]:
                self._answer(200, {"files": [_mode(repo, one) for one in json.loads(body)["files"]]})
            case ["commit", _]:
                self._commit(repo_id, repo, body)
            case _:
                self._answer(404, {"error": "no such page"})

    def _resolve(self, repo_id: str, revision: str, path: str) -> None:
        repo = self.owner.repos.get(repo_id)
        if repo is None or revision not in ("main", repo.revision) or path not in repo.files:
            return self._answer(404, {"error": "Entry not found"}, headers={"X-Error-Code": "EntryNotFound"})
        data = repo.files[path]
        self._send(200, data, {"ETag": f'"{_git_oid(data)}"', "X-Repo-Commit": repo.revision})

    def _batch(self, repo_id: str, asked: Mapping[str, Any]) -> None:
        objects = []
        for one in asked["objects"]:
            known = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.owner.objects:
                href = f"{self.owner.endpoint}/lfs/{repo_id}/{one['oid']}"
                known["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(known)
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "the content is not that of its name"})
        self.owner.objects[oid] = body
        self._answer(200, {})

    def _commit(self, repo_id: str, repo: Repo, body: bytes) -> None:
        files = dict(repo.files)
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.owner.objects:
                    return self._answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                files[value["path"]] = self.owner.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo.files = files
        repo.commits.append(message)
        url = f"{self.owner.endpoint}/{repo_id}/commit/{repo.revision}"
        self._answer(200, {"success": True, "commitUrl": url, "commitOid": repo.revision})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _answer(self, status: int, content: Any, *, headers: Mapping[str, str] | None = None) -> None:
        told = {"X-Error-Message": content["error"]} if isinstance(content, dict) and "error" in content else {}
        self._send(
            status, json.dumps(content).encode(), {**(headers or {}), **told, "Content-Type": "application/json"}
        )

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _mode(repo: Repo, one: Mapping[str, Any]) -> dict[str, Any]:
    large = one["size"] > LFS_FROM_BYTES or one["path"].endswith(".safetensors")
    stored = repo.files.get(one["path"])
    oid = None if stored is None else hashlib.sha256(stored).hexdigest() if large else _git_oid(stored)
    return {"path": one["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
