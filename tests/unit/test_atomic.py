"""Files that are replaced as a whole: a write that fails or is killed leaves the old file."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmtrain.atomic import follow, is_pointer, replacing, write_text


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text("old")
    return path


def test_the_new_text_takes_the_place_of_the_old(file: Path) -> None:
    write_text(file, "nëw\n")
    assert file.read_bytes() == "nëw\n".encode()
    assert os.listdir(file.parent) == [file.name]


def test_a_pointer_is_a_line_that_is_a_path_and_nothing_else(tmp_path: Path) -> None:
    latest, row, compressed = (tmp_path / name for name in ("latest", "rows.jsonl", "rows.gz"))
    latest.write_text("20260101-a/../b\n")
    row.write_text(json.dumps({"text": "q" * 300}) + "\n")
    compressed.write_bytes(b"\x1f\x8b\0\0\n")
    assert [is_pointer(file) for file in (latest, row, compressed)] == [True, False, False]
    assert (follow(latest), follow(row)) == (tmp_path / "20260101-a/../b", row)


def test_a_block_that_fails_leaves_the_old_file_and_nothing_else(file: Path) -> None:
    def stopped() -> Iterator[bytes]:
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), replacing(file) as stream:
        stream.writelines(stopped())
    assert file.read_text() == "old"
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_a_folder_is_not_replaced_by_a_file(name: str) -> None:
    with pytest.raises(IsADirectoryError):
        write_text(Path(name), "x")


def test_a_kill_in_the_middle_leaves_the_old_file(file: Path) -> None:
    code = (
        "import os, pathlib, sys; from llmtrain.atomic import replacing\n"
        "with replacing(pathlib.Path(sys.argv[1])) as file: file.write(b'half'); file.flush(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert file.read_text() == "old"


def test_it_is_on_the_disk_before_it_takes_the_place(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_without_renames_the_file_is_written_anew(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_renames(*paths: Path) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "replace", no_renames)
    write_text(file, "new")
    assert file.read_text() == "new"
    assert os.listdir(file.parent) == [file.name]
