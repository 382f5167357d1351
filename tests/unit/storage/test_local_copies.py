"""The cache of folders: fetched once, whole or not at all, checked, bounded."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

from llmtrain.errors import ConfigError
from llmtrain.storage import _filesystem
from llmtrain.storage.local_copies import copied_from, fetch_folder
from llmtrain.storage.store import open_store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMTRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys whose content was read."""
    seen: list[str] = []
    real = _filesystem.FileSystemStore.read_range

    def counted(self: _filesystem.FileSystemStore, key: str, start: int, length: int) -> bytes:
        seen.append(key)
        return real(self, key, start, length)

    monkeypatch.setattr(_filesystem.FileSystemStore, "read_range", counted)
    return seen


def put(name: str, **files: bytes) -> str:
    for file, content in files.items():
        open_store("memory://copies/").write(f"{name}/{file}", content)
    return f"memory://copies/{name}"


def test_a_folder_is_fetched_once(cache: Path, reads: list[str]) -> None:
    address = put("once", tokenizer=b"1", config=b"22")
    folder = fetch_folder(address)
    assert sorted(path.name for path in folder.iterdir()) == [".copy.json", "config", "tokenizer"]
    assert (folder / "config").read_bytes() == b"22"
    assert copied_from(folder) == address
    assert fetch_folder(f"{address}/") == folder
    assert sorted(reads) == ["once/config", "once/tokenizer"]


def test_only_what_is_wanted_is_fetched(cache: Path) -> None:
    address = put("wanted", **{"config.json": b"1", "pytorch_model.bin": b"2", "a.safetensors": b"3"})
    folder = fetch_folder(address, patterns=("*.json", "*.safetensors"))
    assert sorted(path.name for path in folder.glob("[!.]*")) == ["a.safetensors", "config.json"]
    with pytest.raises(ConfigError, match=r"memory://copies/wanted: holds a.safetensors, and none of \*.txt"):
        fetch_folder(address, patterns=("*.txt",))
    with pytest.raises(ConfigError, match="memory://copies/nothing/: there is no such object"):
        fetch_folder("memory://copies/nothing")


def test_a_changed_folder_is_another_copy_and_offline_the_newest_is_taken(cache: Path) -> None:
    address = put("changed", x=b"old")
    old = fetch_folder(address)
    put("changed", x=b"newer")
    new = fetch_folder(address)
    assert (old / "x").read_bytes() == b"old"
    assert (new / "x").read_bytes() == b"newer"
    os.utime(old / ".copy.json", (1, 1))
    assert fetch_folder(address, offline=True) == new
    with pytest.raises(ConfigError, match=r"is not in the cache .* and the run is offline"):
        fetch_folder("memory://copies/other", offline=True)


def test_a_damaged_copy_is_fetched_anew(cache: Path) -> None:
    address = put("damaged", x=b"12345", y=b"6")
    folder = fetch_folder(address)
    (folder / "x").write_bytes(b"1234X")
    os.utime(folder / "x", ns=(0, 1))
    assert (fetch_folder(address) / "x").read_bytes() == b"12345"
    (folder / "y").unlink()
    assert (fetch_folder(address) / "y").read_bytes() == b"6"


def test_a_copy_that_failed_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = put("fails", x=b"1", y=b"2")
    real = _filesystem.FileSystemStore.read_range

    def breaks(self: _filesystem.FileSystemStore, key: str, start: int, length: int) -> bytes:
        if key.endswith("y"):
            raise KeyboardInterrupt
        return real(self, key, start, length)

    monkeypatch.setattr(_filesystem.FileSystemStore, "read_range", breaks)
    with pytest.raises(KeyboardInterrupt):
        fetch_folder(address)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def test_the_cache_stays_below_its_limit(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, recent = fetch_folder(put("old", x=b"1" * 600)), fetch_folder(put("recent", x=b"2" * 600))
    os.utime(old / ".copy.json", (1, 1))
    monkeypatch.setenv("LLMTRAIN_CACHE_GB", "0.000001")
    newest = fetch_folder(put("newest", x=b"3" * 600))
    assert not old.exists()
    assert recent.exists(), "another process may use it"
    assert newest.exists()


def fetch_in_process(address: str, queue: multiprocessing.Queue[tuple[str, bytes]]) -> None:
    folder = fetch_folder(address)
    queue.put((str(folder), (folder / "x").read_bytes()))


def test_several_processes_share_one_copy(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "x").write_bytes(b"content" * 1000)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[tuple[str, bytes]] = context.Queue()
    address = f"file://{tmp_path}/store"
    processes = [context.Process(target=fetch_in_process, args=(address, queue)) for _ in range(4)]
    for process in processes:
        process.start()
    found = {queue.get(timeout=60) for _ in processes}
    for process in processes:
        process.join(60)
    assert found == {(str(fetch_folder(address)), b"content" * 1000)}
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 1
