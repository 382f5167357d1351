"""What is at an address: an object, a folder, a glob; the same as with files of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtrain.storage.failures import NoObject
from llmtrain.storage.finding import find_objects, find_places, has_wildcard, is_one_object
from llmtrain.storage.store import open_store

NAMES = ("a.jsonl", "b.txt", "sub/a.jsonl", "sub/deep/c.jsonl", ".hidden.jsonl", "sub/.git/x.jsonl", "x[1].jsonl")


@pytest.fixture
def root(request: pytest.FixtureRequest) -> str:
    store, root = open_store("memory://finding/"), f"memory://finding/{abs(hash(request.node.name))}"
    for name in NAMES:
        store.write(f"{root.removeprefix('memory://finding/')}/{name}", name.encode())
    return root


def found(address: str) -> list[str]:
    return [one.inside for one in find_objects(address)]


def test_an_object_a_folder_and_globs_are_found(root: str) -> None:
    assert found(f"{root}/sub/a.jsonl") == ["a.jsonl"]
    visible = ["a.jsonl", "b.txt", "sub/a.jsonl", "sub/deep/c.jsonl", "x[1].jsonl"]
    assert found(root) == found(f"{root}/") == visible
    assert found(f"{root}/*.jsonl") == ["a.jsonl", "x[1].jsonl"]
    assert found(f"{root}/**/*.jsonl") == ["a.jsonl", "sub/a.jsonl", "sub/deep/c.jsonl", "x[1].jsonl"]
    assert found(f"{root}/s*/?.jsonl") == ["sub/a.jsonl"]
    assert found(f"{root}/sub/") == ["a.jsonl", "deep/c.jsonl"]


def test_one_object_is_told_from_a_folder_with_one(root: str) -> None:
    for address, one in ((f"{root}/a.jsonl", True), (f"{root}/sub/deep", False), (f"{root}/b*", False)):
        assert is_one_object(address, find_objects(address)) == one
    assert has_wildcard(f"{root}/*")
    assert not has_wildcard("https://h/x?sig=a*b")


def test_a_glob_names_folders_and_objects_of_a_suffix(root: str) -> None:
    def places(pattern: str) -> list[str]:
        return [str(place).removeprefix(f"{root}/") for place in find_places(f"{root}/{pattern}", suffix=".jsonl")]

    assert places("sub") == ["sub"]
    assert places("*") == ["a.jsonl", "sub", "x[1].jsonl"]
    assert places("s*/*") == ["sub/a.jsonl", "sub/deep"]
    assert places("**/de*/") == ["sub/deep"]
    with pytest.raises(NoObject, match="there is no such object"):
        places("*.txt")


@pytest.mark.parametrize("missing", ["nothing", "nothing/", "*.csv", "su"])
def test_nothing_is_an_error(root: str, missing: str) -> None:
    with pytest.raises(NoObject, match="there is no such object"):
        find_objects(f"{root}/{missing}")


def test_an_object_is_opened_by_what_was_found(root: str, tmp_path: Path) -> None:
    (one,) = find_objects(f"{root}/sub/a.jsonl")
    with one.open() as file:
        assert file.read() == b"sub/a.jsonl"
    assert one.name == f"{root}/sub/a.jsonl"
