"""Addresses: their parts, and that none shows a secret."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.errors import ConfigError
from llmtrain.storage.address import SCHEMES, Address, is_address, is_remote, local_path, parse_address, shown
from llmtrain.storage.versions import at_commit, commit_in
from llmtrain.tracking.redaction import redact

PARTS = {
    "s3://bucket/a/b.jsonl": ("s3", "bucket", "a/b.jsonl"),
    "s3://bucket": ("s3", "bucket", ""),
    "s3:/bucket/a": ("s3", "bucket", "a"),
    "gs://b/x/": ("gs", "b", "x/"),
    "az://container/x": ("az", "container", "x"),
    "https://h:8080/x/y?sig=1": ("https", "h:8080", "x/y?sig=1"),
    "lakefs://repo/main/x/y": ("lakefs", "repo/main", "x/y"),
    "lakefs://repo/main": ("lakefs", "repo/main", ""),
    "hf://owner/name/x": ("hf", "owner/name", "x"),
    "hf://datasets/owner/name@v1/x": ("hf", "datasets/owner/name@v1", "x"),
    "file:///a/b%20c": ("file", "", "a/b c"),
    "memory://m/x": ("memory", "m", "x"),
}


@pytest.mark.parametrize("text", PARTS)
def test_an_address_has_scheme_bucket_and_key(text: str) -> None:
    found = parse_address(text)
    assert (found.scheme, found.bucket, found.key) == PARTS[text]
    assert is_address(text)
    assert is_remote(text) == (found.scheme != "file")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("s3a://b/x", "no store has the scheme s3a: write s3://"),
        ("ftp://b/x", "give one of file, s3, gs"),
        ("lakefs://repo", "write lakefs://repository/branch-or-commit/path"),
        ("lakefs:///main/x", "is no whole address"),
        ("s3://", "write s3://bucket/path"),
        ("hf://name", "write hf://owner/name/path"),
        ("file://server/x", "files of another machine are not read"),
        ("ftp://me:secret@h/x", r"ftp://\*\*\*@h/x"),
    ],
)
def test_what_is_no_address_of_a_store_is_one_message(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_address(text)
    assert "secret" not in str(caught.value)


def test_paths_are_no_addresses() -> None:
    for path in ("runs", "./a:b/c", "/x/2024:01/y", "c:/data", "~/x", "owner/name", "hub:owner/name", ""):
        assert not is_address(path)
        assert local_path(path) == path
    assert local_path("file:///a/b%20c") == "/a/b c"


@given(
    st.sampled_from([scheme for scheme in SCHEMES if scheme not in ("file", "hf")]),
    st.from_regex(r"[a-z0-9][a-z0-9.-]{0,8}", fullmatch=True),
    st.from_regex(r"[\w.=+ -]{1,6}(/[\w.=+ -]{1,6}){0,3}", fullmatch=True),
)
def test_an_address_is_written_as_it_is_read(scheme: str, bucket: str, key: str) -> None:
    address = Address(scheme, f"{bucket}/main" if scheme == "lakefs" else bucket, key)
    assert parse_address(str(address)) == address


SECRET = "s3cr3t-value"


@pytest.mark.parametrize(
    "text",
    [
        f"https://me:{SECRET}@host/rows.jsonl",
        f"https://{SECRET}@host/rows.jsonl",
        f"https://bucket.s3.amazonaws.com/x.jsonl?X-Amz-Credential=AKIA&X-Amz-Signature={SECRET}",
        f"https://account.blob.core.windows.net/c/x?sv=2024&sig={SECRET}",
        f"http://127.0.0.1:80/a?token={SECRET} and (https://h/b?sig={SECRET})",
    ],
)
def test_neither_a_message_nor_a_record_shows_a_secret(text: str) -> None:
    assert SECRET not in shown(text)
    assert SECRET not in redact(text)
    if " " not in text:
        assert SECRET not in repr(parse_address(text))
        assert SECRET not in parse_address(text).shown


def test_only_branches_of_lakefs_are_resolved() -> None:
    commit = "a" * 64
    assert commit_in(f"lakefs://repo/{commit}/x") == commit
    assert commit_in("lakefs://repo/main/x") is None
    assert commit_in("s3://b/x") is None
    known = {"lakefs://repo/main": commit}
    assert at_commit("lakefs://repo/main/x/*.jsonl", known) == f"lakefs://repo/{commit}/x/*.jsonl"
    for text in ("s3://b/x", "rows.jsonl", f"lakefs://repo/{'b' * 64}/x"):
        assert at_commit(text, known) == text
