"""What can be said without torch is said without importing it, and at once."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest

HEAVY = {"torch", "numpy", "rich", "lightning", "transformers", "pyarrow", "tokenizers", "tensorboard"}
SCRIPT = """
import sys
from llmtrain.cli.app import run
code = run(sys.argv[1:])
print(code, *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["train", "--help"],
        ["validate", "quickstart"],
        ["validate", "quickstart", "trainer.max_step=1"],
        ["print-config", "quickstart", "--json"],
        ["print-config", "--schema"],
        ["list-configs"],
        ["runs", "--root-dir", "."],
        ["version"],
    ],
)
def test_nothing_heavy_is_imported(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, check=True)
    _, *modules = done.stderr.splitlines()[-1].split()
    assert "typer" in modules
    assert HEAVY & set(modules) == set()


def test_help_needs_no_pydantic_schema_either() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert "ruamel" not in done.stderr.splitlines()[-1].split()


def test_pretraining_does_not_wait_for_what_adapters_need() -> None:
    script = "import sys, llmtrain.recipes.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"peft", "bitsandbytes", "accelerate", "datasets"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "limit_sec"), [(["--help"], 0.3), (["validate", "quickstart"], 0.5), (["print-config", "quickstart"], 0.5)]
)
def test_it_answers_at_once(argv: list[str], limit_sec: float) -> None:
    # As users have it: with compiled bytecode, which the first run writes. Processor time stands for wall time, which
    # it nearly is on an idle machine, since wall time on one that is shared measures the neighbours.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(6):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "llmtrain", *argv], check=True, stdout=subprocess.DEVNULL, env=environment
        )
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert statistics.median(times[1:]) < limit_sec * 1.3, times
