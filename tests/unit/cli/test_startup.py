"""Commands that need no torch import none, and answer at once."""

from __future__ import annotations

import gc
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from llmtrain.cli.app import VERBS
from llmtrain.cli.importing import large_imports
from tests.support.tiny_run import SYNTHETIC, write_config

HEAVY = {"torch", "numpy", "rich", "lightning_fabric", "transformers", "pyarrow", "tokenizers", "tensorboard", "psutil"}
UNUSED_BY_PRETRAINING = {
    *("lightning", "pytorch_lightning", "torchmetrics", "scipy", "sklearn", "pandas"),
    *("transformers", "peft", "accelerate", "datasets", "trl", "bitsandbytes", "tiktoken"),
    *("mlflow", "wandb", "starlette", "uvicorn", "sacrebleu", "rouge_score", "lm_eval", "onnx", "matplotlib"),
}
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
        ["health", "--help"],
        ["version"],
    ],
)
def test_nothing_heavy_is_imported(argv: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *argv], capture_output=True, text=True, check=True)
    _, *modules = done.stderr.splitlines()[-1].split()
    assert "typer" in modules
    assert HEAVY & set(modules) == set()


def test_help_needs_no_pydantic_either() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, "--help"], capture_output=True, text=True, check=True)
    assert {"pydantic", "pydantic_core", "ruamel"}.isdisjoint(done.stderr.splitlines()[-1].split())


def test_the_table_of_verbs_lists_the_commands_of_each_file() -> None:
    for file, verbs in VERBS.items():
        app = typer.Typer()
        importlib.import_module(f"llmtrain.cli.{file}").add_to(app)
        added: list[Any] = [*app.registered_commands, *app.registered_groups]
        assert tuple(each.name for each in added) == verbs


def test_only_the_file_of_the_given_verb_is_imported() -> None:
    script = "import sys; from llmtrain.cli.app import run; run(['validate', 'quickstart']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    files = {f"llmtrain.cli.{file}" for file in VERBS}
    assert files & set(done.stdout.split()) == {"llmtrain.cli.config"}


def test_training_logs_its_start_before_torch_and_imports_only_what_it_uses(tmp_path: Path) -> None:
    config = write_config(tmp_path / "tiny.yaml", SYNTHETIC)
    command = [sys.executable, "-X", "importtime", "-m", "llmtrain", "train", str(config), "trainer.max_steps=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    before, line, _ = done.stderr.partition(f"[train] starting {config}: decoder, ")
    assert line
    assert "torch" not in imported(before)
    modules = imported(done.stderr)
    assert {"torch", "lightning_fabric"} <= modules
    assert UNUSED_BY_PRETRAINING & modules == set()


def imported(times: str) -> set[str]:
    """Return the top-level names that `-X importtime` tells of."""
    return set(re.findall(r"^import time: .*\| +(\w+)", times, re.MULTILINE))


def test_large_imports_are_not_collected_and_the_collector_is_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.delitem(sys.modules, "torch", raising=False)
        with large_imports():
            assert not gc.isenabled()
    assert gc.isenabled()
    assert gc.get_freeze_count() > 0
    gc.unfreeze()


def test_large_imports_changes_nothing_if_torch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", sys)
    before = gc.get_freeze_count()
    with large_imports():
        assert gc.isenabled()
    assert gc.get_freeze_count() == before


def test_pretraining_imports_no_libraries_of_adapters() -> None:
    script = "import sys, llmtrain.verbs.train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert {"peft", "bitsandbytes", "accelerate", "datasets"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("argv", "limit_sec"), [(["--help"], 0.3), (["validate", "quickstart"], 0.5), (["print-config", "quickstart"], 0.5)]
)
def test_commands_without_torch_answer_at_once(argv: list[str], limit_sec: float) -> None:
    # As users have it: with compiled bytecode, which the first run writes. Processor time stands for wall time, which
    # it nearly is on an idle machine, since wall time on one that is shared measures the neighbours. They slow down
    # processor time too, to the double of an idle machine's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times = []
    for _ in range(6):
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "llmtrain", *argv], check=True, stdout=subprocess.DEVNULL, env=environment
        )
        after = os.times()
        times.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(times[1:]) < limit_sec * 2, times
