"""`llmtrain train` on text and on a dataset, without `prepare`; under two processes the text is prepared once."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import datasets
import pytest

from llmtrain.cli.app import run
from tests.support.ranks import free_port
from tests.support.tiny_run import tiny_config, write_config


def _write(folder: Path, data: dict[str, Any]) -> Path:
    keys = tiny_config(folder / "unused", folder / "runs")
    del keys["prepare"]
    text = {"seq_len": 32, "cache_dir": str(folder / "cache"), "tokenizer": {"kind": "bpe", "vocab_size": 300}}
    keys["data"] = {**text, "val_fraction": 0.2, **data}
    keys["trainer"] |= {"max_steps": 6, "eval_every_steps": 3, "save_every_steps": 3}
    return write_config(folder / "text.yaml", keys)


def _dataset(folder: Path) -> dict[str, Any]:
    files = sorted(Path(sysconfig.get_path("stdlib"), "json").glob("*.py"))
    rows = [{"content": part} for file in files for part in file.read_text().split("\n\n") if part.strip()]
    datasets.Dataset.from_list(rows).save_to_disk(str(folder / "saved"))
    return {"name": "huggingface", "path": str(folder / "saved"), "train": "train[:80%]"}


def _corpus(folder: Path) -> dict[str, Any]:
    packages = [f"{sysconfig.get_path('stdlib')}/{name}/*.py" for name in ("json", "email")]
    return {"name": "corpus", "train": packages}


@pytest.mark.parametrize("kind", ["corpus", "huggingface"])
def test_a_model_is_trained_and_evaluated_on_text(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _write(tmp_path, (_corpus if kind == "corpus" else _dataset)(tmp_path))
    assert run(["train", str(config), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["steps"] == 6
    made = sorted(path.name for path in (tmp_path / "cache/corpora").iterdir() if not path.name.startswith("."))
    assert run(["eval", summary["run"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0
    assert run(["generate", summary["run"], "--prompt", "def ", "--max-new-tokens", "4"]) == 0
    assert sorted(path.name for path in (tmp_path / "cache/corpora").iterdir() if path.name[0] != ".") == made
    assert len(made) == 1


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_prepare_the_text_once(tmp_path: Path) -> None:
    config = _write(tmp_path, _corpus(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    done = subprocess.run(
        [*command, "-m", "llmtrain", "train", str(config), "trainer.micro_batch_size=2"],
        capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("preparing the text, once") == 1
