"""Every store keeps the same promises: S3 by moto's server, lakeFS by the server of the tests, memory and files."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.storage.address import parse_address
from llmtrain.storage.failures import NoObject, StorageError
from llmtrain.storage.store import Store, open_store
from tests.support.lakefs import LocalLakeFS
from tests.support.moto_s3 import LocalS3

KINDS = ("s3", "memory", "file", "lakefs", "lakefs signed")


@pytest.fixture(params=KINDS)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Store, str]:
    """A store, and a folder in it that is empty: its keys' beginning."""
    kind = str(request.param)
    if kind == "s3":
        server: LocalS3 = request.getfixturevalue("s3")
        root = f"{server.make_bucket('stores')}/{request.node.name}"
    elif kind.startswith("lakefs"):
        lake: LocalLakeFS = request.getfixturevalue("lake")
        lake.signs, lake.page = kind.endswith("signed"), 2
        lake.commit("repo", "main", {})
        root = "lakefs://repo/main/sub folder"
    else:
        root = f"memory://bucket/{request.node.name}" if kind == "memory" else f"file://{tmp_path}"
    return open_store(root), f"{parse_address(f'{root}/').key}"


def test_what_is_written_is_read(place: tuple[Store, str], tmp_path: Path) -> None:
    store, base = place
    store.write(f"{base}a/x", b"0123456789")
    (tmp_path / "big").write_bytes(bytes(range(256)) * 100)
    store.write(f"{base}a/of a file+%", tmp_path / "big")
    assert store.read(f"{base}a/x") == b"0123456789"
    assert store.read(f"{base}a/of a file+%") == bytes(range(256)) * 100
    assert store.size(f"{base}a/x") == 10
    assert store.read_range(f"{base}a/x", 8, 2) == b"89"
    assert store.read_ranges(f"{base}a/x", [(0, 2), (4, 0), (5, 3)]) == [b"01", b"", b"567"]
    first = store.stat(f"{base}a/x").etag
    store.write(f"{base}a/x", b"9876543210")
    assert first
    assert store.stat(f"{base}a/x").etag != first
    assert store.read(f"{base}a/x") == b"9876543210"


@pytest.mark.parametrize("ranges", [[(8, 5)], [(10, 5)], [(0, 2), (20, 1), (8, 2)]])
def test_ranges_that_an_object_does_not_have_are_an_error(
    place: tuple[Store, str], ranges: list[tuple[int, int]]
) -> None:
    store, base = place
    store.write(f"{base}x", b"0123456789")
    with pytest.raises(StorageError, match=r"x: the object ends before byte \d+: it was replaced"):
        store.read_ranges(f"{base}x", ranges)


def test_a_list_has_the_objects_of_a_folder_and_below(place: tuple[Store, str]) -> None:
    store, base = place
    names = ["a/1", "a/2", "a/b/3", "a/b/c/4", "ab", "a.txt"]
    for number, name in enumerate(names):
        store.write(f"{base}{name}", b"x" * number)
    found = {entry.key.removeprefix(base): entry for entry in store.list(f"{base}a")}
    assert sorted(found) == ["a/1", "a/2", "a/b/3", "a/b/c/4"]
    assert [found[name].size for name in sorted(found)] == [0, 1, 2, 3]
    assert found["a/2"] == store.stat(f"{base}a/2")
    assert sorted(entry.key for entry in store.list(base.rstrip("/"))) == sorted(base + name for name in names)
    assert list(store.list(f"{base}nothing")) == []


def test_a_missing_object_is_one_message(place: tuple[Store, str]) -> None:
    store, base = place
    store.write(f"{base}folder/x", b"1")
    for missing in ("nope", "folder"):
        assert not store.exists(base + missing)
        for ask in (store.stat, store.read, store.open):
            with pytest.raises(NoObject) as caught:
                ask(base + missing)
            assert str(caught.value) == f"{store.root}{base}{missing}: there is no such object: check the address"
    assert store.exists(f"{base}folder/x")
    store.delete(f"{base}folder/x")
    store.delete(f"{base}folder/x")
    assert not store.exists(f"{base}folder/x")


def test_an_open_object_is_read_at_any_position(place: tuple[Store, str]) -> None:
    store, base = place
    content = b"".join(f"line {number}\n".encode() for number in range(100_000))
    store.write(f"{base}lines", content)
    with store.open(f"{base}lines") as file:
        assert file.read(10) == content[:10]
        assert file.readline() == content[10:14]
        assert file.seek(-7, 2) == len(content) - 7
        assert file.read() == content[-7:]
        assert file.read() == b""
        assert file.seek(0) == 0
        assert list(file) == content.splitlines(keepends=True)
