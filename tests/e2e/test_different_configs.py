"""Two processes whose config files differ end in one message, which names the key, and make no run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.tiny_run import SYNTHETIC, write_config

EACH_ITS_OWN = """
import os, sys
from llmtrain.cli.app import run
sys.exit(run(["train", f"{os.environ['RANK']}.yaml"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "key", "values"), [("optimizer", "lr", (0.001, 0.002)), ("distributed", "strategy", ("ddp", "fsdp"))]
)
def test_processes_with_different_files_are_rejected(
    tmp_path: Path, section: str, key: str, values: tuple[object, object]
) -> None:
    for rank, value in enumerate(values):
        keys = {**SYNTHETIC, "run": {"device": "cpu"}, "output": {"root_dir": "runs"}, section: {key: value}}
        write_config(tmp_path / f"{rank}.yaml", keys)
    (tmp_path / "each.py").write_text(EACH_ITS_OWN)
    done = subprocess.run(
        [sys.executable, "-m", "llmtrain.distributed.torchrun", "--standalone", "--nproc-per-node=2", "each.py"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    named = f"{section}.{key} is {values[0]} on rank 0 and {values[1]} on rank 1"
    assert named in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()
