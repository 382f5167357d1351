"""The part of lakeFS's API that is used, on 127.0.0.1, with an object store beside it that takes signed links.

>>> with LocalLakeFS() as lake:
...     lake.commit("repo", "main", {"rows.jsonl": b"…"})   # a branch moves with each commit
...     lake.fail("/objects", status=503, times=2)
...     ...  # with the variables lake.environment: lakefs://repo/main/rows.jsonl

config · refs/{ref}/objects, objects/stat (also presigned), objects/ls · refs/{ref}/commits · branches/{branch}/objects
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

ACCESS_KEY, SECRET_KEY = "AKIALOCALLAKEFS00000", "secret-of-the-lake"


@dataclass
class _Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    staged: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Content of a branch: its newest commit, and what was written since."""


@dataclass
class _Fault:
    part: str
    status: int
    times: int


class LocalLakeFS:
    """A server with one user. With `signs`, links to content are signed for a server on another port."""

    def __init__(self, *, signs: bool = False, page: int = 1000) -> None:
        self.repositories: dict[str, _Repository] = {}
        self.requests: list[str] = []
        """Method and path of each request to the API."""
        self.links: list[str] = []
        """Signed links that were followed, with their ranges."""
        self.link_seconds = 600.0
        self.signs = signs
        self.page = page
        self._faults: list[_Fault] = []
        self._blobs: dict[str, bytes] = {}
        self._api = _serve(self, _Api)
        self._store = _serve(self, _Links)

    def __enter__(self) -> LocalLakeFS:
        self.endpoint = f"http://127.0.0.1:{self._api.server_port}"
        self.environment = {
            "LAKEFS_ENDPOINT": self.endpoint,
            "LAKEFS_ACCESS_KEY": ACCESS_KEY,
            "LAKEFS_SECRET_KEY": SECRET_KEY,
            "NO_PROXY": "127.0.0.1",
        }
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for server in (self._api, self._store):
            server.shutdown()
            server.server_close()

    def commit(self, repository: str, branch: str, files: dict[str, bytes]) -> str:
        """Make `files` the content of a branch, in a commit. Return its id."""
        found = self.repositories.setdefault(repository, _Repository())
        text = f"{len(found.commits)}{sorted(files)}{[hashlib.sha256(one).hexdigest() for one in files.values()]}"
        commit = hashlib.sha256(text.encode()).hexdigest()
        found.commits[commit] = dict(files)
        found.branches[branch] = commit
        found.staged[branch] = dict(files)
        return commit

    def fail(self, part: str, *, status: int, times: int = 1) -> None:
        """Answer the next `times` requests whose path contains `part` with `status`."""
        self._faults.append(_Fault(part, status, times))

    def fault_for(self, path: str) -> int | None:
        """Return the status of a fault that the path meets, and count it."""
        for fault in self._faults:
            if fault.part in path and fault.times:
                fault.times -= 1
                return fault.status
        return None

    def sign(self, content: bytes, ends: float) -> str:
        """Return a signed link to a content."""
        name = hashlib.sha256(content).hexdigest()
        self._blobs[name] = content
        return f"http://127.0.0.1:{self._store.server_port}/{name}?ends={ends}&X-Signature=signed-{name[:8]}"

    def blob(self, name: str) -> bytes:
        """Return a content that a link was signed for."""
        return self._blobs[name]


def _serve(lake: LocalLakeFS, handler: type[BaseHTTPRequestHandler]) -> ThreadingHTTPServer:
    kind = type(handler.__name__, (handler,), {"lake": lake})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lake: LocalLakeFS

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def answer_content(self, content: bytes) -> None:
        """Answer a content, or the range of it that is asked for."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self.answer(200, content)
            return
        start, end = int(asked[1]), min(int(asked[2]), len(content) - 1)
        if start > end:
            self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        else:
            where = {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            self.answer(206, content[start : end + 1], where)


class _Links(_Handler):
    def do_GET(self) -> None:
        url = urlsplit(self.path)
        self.lake.links.append(f"{url.path} {self.headers.get('Range')}")
        ends = float(parse_qs(url.query)["ends"][0])
        if "Authorization" in self.headers:  # as S3 does: a signed link says itself who asks
            self.answer(400, b"only one auth mechanism allowed")
        elif time.time() > ends:
            self.answer(403, b"expired")
        else:
            self.answer_content(self.lake.blob(url.path.strip("/")))


class _Api(_Handler):
    def do_GET(self) -> None:
        self._route("GET")

    def do_POST(self) -> None:
        self._route("POST")

    def do_DELETE(self) -> None:
        self._route("DELETE")

    def _route(self, method: str) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.lake.requests.append(f"{method} {url.path}")
        if fault := self.lake.fault_for(url.path):
            self._say(fault, {"message": f"fault {fault}"})
            return
        known = base64.b64encode(f"{ACCESS_KEY}:{SECRET_KEY}".encode()).decode()
        if self.headers.get("Authorization") != f"Basic {known}":
            self._say(401, {"message": "error authenticating request"})
            return
        query = {name: values[0] for name, values in parse_qs(url.query, keep_blank_values=True).items()}
        path = url.path.removeprefix("/api/v1")
        if path == "/config":
            self._say(200, {"storage_config": {"pre_sign_support": self.lake.signs}})
            return
        found = re.fullmatch(r"/repositories/([^/]+)/(refs|branches)/([^/]+)/(.+)", path)
        repository = self.lake.repositories.get(unquote(found[1])) if found else None
        if found is None or repository is None:
            self._say(404, {"message": "repository not found"})
            return
        ref, what = unquote(found[3]), found[4]
        if found[2] == "branches" and what == "objects":
            self._change(method, repository, ref, query["path"], body)
            return
        files = repository.commits.get(ref, repository.staged.get(ref))
        if files is None:
            self._say(404, {"message": "reference not found"})
        elif what == "commits":
            self._say(200, {"results": [{"id": repository.branches.get(ref, ref)}], "pagination": {"has_more": False}})
        elif what == "objects/ls":
            self._list(files, query)
        elif query["path"] not in files:
            self._say(404, {"message": "path not found"})
        elif what == "objects/stat":
            self._say(200, self._stat(query["path"], files[query["path"]], presign=query.get("presign") == "true"))
        else:
            self.answer_content(files[query["path"]])

    def _stat(self, path: str, content: bytes, *, presign: bool = False) -> dict[str, Any]:
        found = {
            "path": path,
            "path_type": "object",
            "physical_address": f"s3://behind/{quote(path)}",
            "checksum": hashlib.md5(content, usedforsecurity=False).hexdigest(),
            "size_bytes": len(content),
            "mtime": 1,
        }
        if presign:
            ends = time.time() + self.lake.link_seconds
            found |= {"physical_address": self.lake.sign(content, ends), "physical_address_expiry": int(ends) + 60}
        return found

    def _list(self, files: dict[str, bytes], query: dict[str, str]) -> None:
        after, prefix = query.get("after", ""), query.get("prefix", "")
        names = [name for name in sorted(files) if name.startswith(prefix) and name > after]
        amount = min(int(query["amount"]), self.lake.page)
        page = names[:amount]
        pagination = {"has_more": len(names) > amount, "next_offset": page[-1] if page else ""}
        self._say(200, {"results": [self._stat(name, files[name]) for name in page], "pagination": pagination})

    def _change(self, method: str, repository: _Repository, branch: str, path: str, body: bytes) -> None:
        if branch not in repository.staged:
            self._say(404, {"message": "branch not found"})
        elif method == "POST":
            repository.staged[branch][path] = body
            self._say(201, self._stat(path, body))
        else:
            repository.staged[branch].pop(path, None)
            self.answer(204, b"")

    def _say(self, status: int, document: dict[str, Any]) -> None:
        self.answer(status, json.dumps(document).encode(), {"Content-Type": "application/json"})
