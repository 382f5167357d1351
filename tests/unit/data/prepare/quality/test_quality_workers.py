"""Processes for the quality steps, and preparations with steps that are killed."""

from __future__ import annotations

import hashlib
import importlib
import linecache
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ruamel.yaml import YAML

from llmtrain.config.loading.load import load_config
from llmtrain.config.sections.data import PrepareConfig
from llmtrain.data.prepare.quality import workers
from llmtrain.data.prepare.quality.workers import OpenSteps, open_steps
from llmtrain.data.prepare.token_shards import prepare
from llmtrain.errors import ConfigError, RunError
from llmtrain.faults import VARIABLE
from tests.support.planted_duplicates import plant

STEPS = [
    {"name": "mask_pii"},
    {"name": "near_duplicates"},
    {"name": "own", "function": "own_workers:step"},
    {"name": "exact_duplicates"},
]
OWN = "def step(text):\n    assert 'fail' not in text\n    return None if 'drop' in text else text.strip()\n"


def _list(steps: list[dict[str, str]] = STEPS) -> PrepareConfig:
    return PrepareConfig.model_validate({"input": "in", "output": "out", "steps": steps})


@pytest.fixture
def _own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_workers.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_workers", raising=False)  # of another test


@pytest.mark.usefixtures("_own")
def test_processes_are_started_for_much_text_and_slow_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []
    monkeypatch.setattr(workers, "_Process", lambda steps: started.append(1))
    monkeypatch.setattr(OpenSteps, "close", lambda self: None)
    quick = _list([{"name": "length"}, {"name": "exact_duplicates"}])
    for options, num_workers, num_bytes, expected in (
        (_list(), 2, 1 << 30, 2),
        (_list(), 2, 1 << 20, 0),
        (_list(), 1, 1 << 30, 0),
        (quick, 2, 1 << 30, 0),
    ):
        started.clear()
        with open_steps(options.steps, num_workers=num_workers, num_bytes=num_bytes):
            assert len(started) == expected


@pytest.mark.slow
@pytest.mark.usefixtures("_own")
def test_a_process_gives_what_the_thread_gives_and_its_death_is_told() -> None:
    texts = [" text of bob@example.org ", "drop", "fail", *plant(5, seed=0).texts]
    here = OpenSteps(_list().steps)
    beside = OpenSteps(_list().steps, 1)
    try:
        mine, theirs = (steps.examine(texts, sample_share=1.0) for steps in (here, beside))
        assert (mine.errors, mine.sample) == (theirs.errors, theirs.sample)
        assert list(mine.errors) == [2]
        for name in ("hashes", "num_bytes", "dropped_by", "signatures"):
            assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
        assert beside.alter(texts[:1]) == here.alter(texts[:1]) == ["text of <email>"]
        [process] = beside._processes
        assert process._process.pid is not None
        os.kill(process._process.pid, signal.SIGKILL)
        with pytest.raises(RunError, match=r"died with exit code -9.*lower prepare\.num_workers"):
            beside.examine(texts, sample_share=0)
    finally:
        beside.close()


@pytest.mark.usefixtures("_own")
def test_steps_that_were_sent_are_the_same_or_say_what_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" text of bob@example.org ", "drop", "fail", *plant(5, seed=0).texts]
    here = OpenSteps(_list().steps)
    sent = pickle.dumps(here)
    there = pickle.loads(sent)
    mine, theirs = (steps.examine(texts, sample_share=1.0) for steps in (here, there))
    assert (mine.errors, mine.sample) == (theirs.errors, theirs.sample)
    for name in ("hashes", "num_bytes", "dropped_by", "signatures"):
        assert np.array_equal(getattr(mine, name), getattr(theirs, name)), name
    monkeypatch.setitem(sys.modules, "own_workers", None)
    monkeypatch.delitem(sys.modules, "own_workers")
    (tmp_path / "own_workers.py").write_text(f"{OWN}# another file\n")
    importlib.invalidate_caches()
    linecache.checkcache()
    with pytest.raises(ConfigError, match=r"prepare\.steps: \S+ has another own than the machine of this command"):
        pickle.loads(sent).examine(texts, sample_share=1.0)


def _hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.slow
@pytest.mark.usefixtures("_own")
@pytest.mark.parametrize("point", ["scan-saved", "shard-noted:1", "manifest-written"])
def test_a_killed_preparation_goes_on_to_the_same_bytes(tmp_path: Path, point: str) -> None:
    (tmp_path / "in").mkdir()
    for number, text in enumerate([*plant(20, seed=1).texts, "drop", "again", "again"]):
        (tmp_path / "in" / f"{number:03}.txt").write_text(text)
    path = tmp_path / "config.yaml"
    section = {"input": "in", "output": "out", "val_fraction": 0, "shard_size": 3000, "tokenizer": {"vocab_size": 300}}
    with path.open("w") as file:
        YAML().dump({"prepare": {**section, "steps": STEPS}, "data": {"name": "tokens", "train": "out/train"}}, file)
    prepare(load_config(str(path)).config)
    expected = _hashes(tmp_path / "out")
    assert "dropped.jsonl" in expected
    (tmp_path / "out").rename(tmp_path / "expected")
    killed = subprocess.run(
        [sys.executable, "-m", "llmtrain", "prepare", str(path)],
        env={**os.environ, VARIABLE: f"kill@{point}"},
        capture_output=True,
        text=True,
    )
    assert killed.returncode == -9, killed.stderr
    prepare(load_config(str(path)).config)
    assert _hashes(tmp_path / "out") == expected
