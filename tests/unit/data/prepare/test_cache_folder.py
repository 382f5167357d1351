"""Folders of prepared data that cannot be had, and what the message says to set."""

from __future__ import annotations

import errno
import os
import pwd
import tempfile
from pathlib import Path

import pytest
from safetensors import SafetensorError

from llmtrain.data.chat.cache import ensure_samples
from llmtrain.data.prepare.output import resolve_cache_dir
from llmtrain.errors import ConfigError, in_surroundings


def test_without_a_home_folder_the_key_is_named_and_no_folder_of_the_name_tilde_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.chdir(tmp_path)
    assert resolve_cache_dir("cache") == tmp_path / "cache"
    monkeypatch.setenv("HOME", "/somewhere")
    assert resolve_cache_dir("~/.cache/llmtrain") == Path("/somewhere/.cache/llmtrain")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(ConfigError, match=r"data\.cache_dir is ~/\.cache/llmtrain, .*set data\.cache_dir .*HF_HOME"):
        resolve_cache_dir("~/.cache/llmtrain")
    assert list(tmp_path.iterdir()) == []


def test_a_home_that_is_a_file_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")
    folder = tmp_path / "home" / ".cache" / "llmtrain" / "samples-1"
    with pytest.raises(
        ConfigError, match=r"data\.cache_dir: .*Not a directory.*name another folder as data\.cache_dir"
    ):
        ensure_samples(folder, key={}, make=list)


def test_errors_of_the_machine_are_messages_and_others_are_bugs() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/a")
    assert in_surroundings(full) == "/data/a: No space left on device: make room there"
    home = in_surroundings(RuntimeError("Could not determine home directory."))
    assert home is not None
    assert "data.cache_dir and HF_HOME" in home
    assert "ulimit -f" in str(in_surroundings(OSError(errno.EFBIG, os.strerror(errno.EFBIG), "/data/a")))
    in_rust = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert in_surroundings(in_rust) == "a file: No space left on device: make room there"
    assert in_surroundings(OSError(errno.EBADF, "bad file descriptor")) is None
    assert in_surroundings(ValueError("x")) is None


def test_a_working_folder_or_a_temporary_folder_that_is_gone_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    here.rmdir()
    with pytest.raises(FileNotFoundError) as gone:
        os.getcwd()
    assert "started is gone" in str(in_surroundings(gone.value))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", list)
    with pytest.raises(FileNotFoundError) as none:
        tempfile.mkstemp()
    assert "set TMPDIR" in str(in_surroundings(none.value))
