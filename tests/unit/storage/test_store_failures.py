"""Failures of stores: each is one message, in a bounded number of attempts, without secrets."""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from llmtrain.errors import ConfigError
from llmtrain.storage.failures import ATTEMPTS, AccessDenied, NoObject, StorageError
from llmtrain.storage.store import Store, open_store
from tests.support.lakefs import SECRET_KEY, LocalLakeFS
from tests.support.moto_s3 import LocalS3

SECRET = "secret-of-a-test"


class Answers(BaseHTTPRequestHandler):
    """Answers each request with the next of `statuses`, the last one for ever; 200 with the path as content."""

    protocol_version = "HTTP/1.1"
    statuses: list[int]
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        content = b"0123456789" if status == 200 else b"<Error><Code>Whatever</Code></Error>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", '"etag-1"')
        self.send_header("Last-Modified", "Mon, 30 Nov 2026 10:00:00 GMT")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Answers]]:
    handler = type("OneTestsAnswers", (Answers,), {"statuses": [200], "seen": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "AKIATESTTESTTESTTEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "GOOGLE_BASE_URL": endpoint,
        "GOOGLE_SKIP_SIGNATURE": "true",
        "AZURE_STORAGE_ENDPOINT": f"{endpoint}/account",
        "AZURE_STORAGE_ACCOUNT_NAME": "account",
        "AZURE_STORAGE_ACCOUNT_KEY": "c2VjcmV0",
        "LAKEFS_ENDPOINT": endpoint,
        "LAKEFS_ACCESS_KEY": "AKIA",
        "LAKEFS_SECRET_KEY": SECRET,
    }.items():
        monkeypatch.setenv(name, value)
    handler.endpoint = endpoint  # type: ignore[attr-defined]
    yield handler
    server.shutdown()
    server.server_close()


def place(kind: str, answers: Any) -> str:
    return (
        f"{answers.endpoint}/x?sig={SECRET}"
        if kind == "http"
        else {"lakefs": "lakefs://repo/main/x"}.get(kind, f"{kind}://bucket/x")
    )


def read(address: str) -> bytes:
    from llmtrain.storage.store import locate

    store, key = locate(address)
    return store.read(key)


KINDS = ("s3", "gs", "az", "http", "lakefs")


@pytest.mark.parametrize("kind", ["s3", "gs", "az", "http"])
def test_a_failure_that_passes_is_tried_again(kind: str, answers: type[Answers]) -> None:
    answers.statuses[:] = [503, 500, 200]
    assert read(place(kind, answers)) == b"0123456789"
    assert len(answers.seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_fails_is_one_message_after_all_attempts(kind: str, answers: type[Answers]) -> None:
    answers.statuses[:] = [503]
    with pytest.raises(
        StorageError, match=rf"127.0.0.1:\d+.* answers 503 \({ATTEMPTS} attempts\): check that"
    ) as caught:
        read(place(kind, answers))
    assert len(answers.seen) == ATTEMPTS
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", [401, 403])
def test_credentials_that_are_rejected_name_what_to_set(kind: str, status: int, answers: type[Answers]) -> None:
    answers.statuses[:] = [status]
    named = {"s3": "AWS_ACCESS_KEY_ID", "gs": "GOOGLE_APP", "az": "AZURE_STORAGE", "lakefs": "LAKEFS_ACCESS_KEY"}
    with pytest.raises(AccessDenied, match=rf"access denied \({status} .*{named.get(kind, 'signed link')}") as caught:
        read(place(kind, answers))
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_there_is_one_message(kind: str, answers: type[Answers]) -> None:
    answers.statuses[:] = [404]
    with pytest.raises(NoObject, match="there is no such object: check the address") as caught:
        read(place(kind, answers))
    assert len(answers.seen) == 1
    assert SECRET not in str(caught.value)


def test_an_endpoint_that_is_down_is_one_message(monkeypatch: pytest.MonkeyPatch, lake: LocalLakeFS) -> None:
    down = "http://127.0.0.1:9"
    for name in ("AWS_ENDPOINT_URL", "LAKEFS_ENDPOINT"):
        monkeypatch.setenv(name, down)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for address in ("s3://bucket/x", "lakefs://repo/main/x", f"{down}/x?sig={SECRET}"):
        with pytest.raises(StorageError, match=r"127\.0\.0\.1:9 .*Connection refused.*\(5 attempts\)") as caught:
            read(address)
        assert SECRET not in str(caught.value)
        assert SECRET_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "ask", [lambda store: list(store.list("")), lambda store: store.read("x"), lambda store: store.write("x", b"")]
)
def test_a_bucket_that_is_not_there_is_named(ask: Callable[[Store], object], s3: LocalS3) -> None:
    with pytest.raises(NoObject, match=r"s3://no-such-bucket/: there is no such bucket"):
        ask(open_store("s3://no-such-bucket/x"))


def test_a_missing_package_is_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] == "obstore":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match=r"s3://b/ needs a package that is not installed: .* install .*\[s3\]"):
        open_store("s3://b/x")


def test_what_lakefs_needs_is_named() -> None:
    with pytest.raises(ConfigError, match="set LAKEFS_ENDPOINT and LAKEFS_ACCESS_KEY and LAKEFS_SECRET_KEY"):
        open_store("lakefs://repo/main/x")


def test_the_files_of_the_aws_command_line_are_read(
    s3_server: LocalS3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    s3_server.make_bucket("profiles")
    (tmp_path / "aws-credentials").write_text(
        "[other]\naws_access_key_id = AKIAOTHEROTHEROTHER0\naws_secret_access_key = x%y\n[empty]\n"
    )
    (tmp_path / "aws-config").write_text(f"[profile other]\nregion = us-east-1\nendpoint_url = {s3_server.endpoint}\n")
    monkeypatch.setenv("AWS_PROFILE", "other")
    store = open_store("s3://profiles/x")
    store.write("x", b"1")
    assert store.read("x") == b"1"
    monkeypatch.setenv("AWS_PROFILE", "empty")
    with pytest.raises(
        ConfigError, match=r"profile empty .* has no aws_access_key_id in ~/.aws: .* export-credentials"
    ):
        open_store("s3://elsewhere/x")


def test_an_account_of_azure_has_to_be_named() -> None:
    with pytest.raises(ConfigError, match="set AZURE_STORAGE_ACCOUNT_NAME"):
        open_store("az://container/x")


def test_a_signed_link_that_has_ended_is_asked_for_again(lake: LocalLakeFS) -> None:
    lake.signs, lake.link_seconds = True, 0.0
    lake.commit("repo", "main", {"x": b"0123456789"})
    store = open_store("lakefs://repo/main/x")
    assert store.size("x") == 10
    lake.link_seconds = 600.0
    assert store.read_range("x", 2, 3) == b"234"
    assert len(lake.links) == 2, "the first link had ended"


def test_a_page_of_a_web_server_is_read_by_ranges_only_where_it_knows_them(answers: Any) -> None:
    store = open_store(f"{answers.endpoint}/x")
    assert store.size("x") == 10
    with store.open("x") as file:
        assert file.seek(4) == 4
        assert file.read() == b"456789"
    assert store.stat("x").etag == "etag-1"
    for ask in (lambda: store.list(""), lambda: store.write("x", b""), lambda: store.delete("x")):
        with pytest.raises(StorageError, match="web server"):
            ask()
