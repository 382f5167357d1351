"""The manual's model and data of one's own: trained, resumed, evaluated, asked, planned, and spread over processes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmtrain.cli.app import run as command_line
from tests.support.tiny_run import weight_hash

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "your-own.md"
LITTLE = ["run.device=cpu", "trainer.precision=32", "tracking.tensorboard.enabled=false"]

Says = Callable[..., Any]


@pytest.fixture
def folder(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a user stands: the files of the manual's page, a text, and a tokenizer."""
    for text in re.findall(r"```\w+\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        file = tmp_path / text.partition("\n")[0].removeprefix("# ")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    shutil.copytree(shards / "tokenizer", tmp_path / "tokenizer")
    shutil.copyfile(shutil.__file__, tmp_path / "text.txt")
    monkeypatch.chdir(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_pkg"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


@pytest.fixture
def says(capsys: pytest.CaptureFixture[str]) -> Says:
    """Runs a command with --json; returns its document."""

    def call(*words: str, code: int = 0) -> Any:
        assert command_line([*words, "--json"]) == code
        return json.loads(capsys.readouterr().out)

    return call


def test_the_page_trains_resumes_bit_identically_evaluates_and_generates(
    folder: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert says("validate", "my.yaml")["valid"]
    whole = says("train", "my.yaml", *LITTLE, "output.run_id=whole", "data.num_workers=1")
    assert whole["last_loss"] < whole["first_loss"] - 0.5

    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=13")
    says("train", "my.yaml", *LITTLE, "output.run_id=stopped", code=75)
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    says("train", "--resume", "stopped")
    assert weight_hash(folder / "runs" / "stopped") == weight_hash(folder / "runs" / "whole")

    evaluated = says("eval", "whole")
    assert evaluated["loss"] == pytest.approx(whole["val_loss"], rel=1e-5)
    asked = ("generate", "whole", "--prompt", "def copy(", "--prompt", "import", "--max-new-tokens", "8")
    texts = [one["completion"] for one in says(*asked)]
    assert texts == [one["completion"] for one in says(*asked)]
    assert all(texts)


def test_the_page_is_planned_and_what_it_cannot_do_is_one_message(folder: Path, says: Says) -> None:
    planned = says("plan", "my.yaml", *LITTLE)
    assert planned["parameters"]["total"] == planned["model"]["vocab_size"] * 65 + 32 * 32 * 8 + 32
    assert planned["memory"]["peak_bytes"] > 0
    assert planned["run"]["steps"] == 30

    says("train", "my.yaml", *LITTLE, "output.run_id=one", "trainer.max_steps=2", "trainer.eval_every_steps=null")
    made_from = says("lineage", "one", "--verify")["lineage"]["made_from"]
    assert [(one["kind"], one["name"]) for one in made_from if one["kind"] == "code"] == [
        ("code", "my_pkg.models:Convolution"),
        ("code", "my_pkg.data:TextFile"),
    ]
    assert "use --format safetensors" in says("export", "one", code=2)["error"]["message"]
    assert "is a whole model, without an adapter" in says("merge", "one", code=2)["error"]["message"]
    shutil.copytree(folder / "runs" / "one" / "model", folder / "alone")
    assert (
        "if the config.yaml of its run names it"
        in says("generate", "alone", "--prompt", "a", code=2)["error"]["message"]
    )
    assert "your own class" in says("inspect", "my.yaml", code=2)["error"]["message"]
    for key, message in {
        "model.name=my_pkg.models:Missing": "model.name: my_pkg.models has no function or class 'Missing'",
        "data.name=my_pkg.nowhere:D": "data.name: my_pkg.nowhere cannot be imported (ModuleNotFoundError",
        "model.options.depth=3": "failed (TypeError",
        "trainer.activation_checkpointing=true": "has no method checkpoint_blocks()",
        "distributed.strategy=fsdp_tp": "fsdp_tp",
        "model.lora={}": "name a trained model in init_from",
    }.items():
        assert message in says("train", "my.yaml", *LITTLE, key, code=2)["error"]["message"]


def test_adapters_are_trained_merged_exported_and_published(
    folder: Path, says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*LITTLE, "trainer.eval_every_steps=null", "trainer.max_steps=6"]
    says("train", "my.yaml", *keys, "output.run_id=base")
    tuning = ["model.init_from=base", "model.lora={r: 4}", "optimizer.lr=0.05"]
    planned = says("plan", "my.yaml", *keys, *tuning)
    assert planned["parameters"]["trainable"] == 4 * (32 + planned["model"]["vocab_size"])
    whole = says("train", "my.yaml", *keys, *tuning, "output.run_id=tuned")
    assert whole["last_loss"] < says("eval", "base")["loss"]
    monkeypatch.setenv("LLMTRAIN_FAULTS", "term@stepped:step=3")
    says("train", "my.yaml", *keys, *tuning, "output.run_id=stopped", code=75)
    monkeypatch.delenv("LLMTRAIN_FAULTS")
    says("train", "--resume", "stopped")
    assert weight_hash(folder / "runs" / "stopped") == weight_hash(folder / "runs" / "tuned")

    loss = says("eval", "tuned")["loss"]
    assert loss < says("eval", "base")["loss"] - 0.01
    merged = says("merge", "tuned", "--dtype", "float32")
    assert merged["max_logit_difference"] < 1e-4, "from base and adapter"
    exported = says("export", "tuned", "--format", "safetensors")
    published = says("publish", "tuned", "--license", "mit")
    asked = ("--prompt", "def copy(", "--max-new-tokens", "6")
    (text,) = says("generate", "tuned", *asked)
    for made in (merged["output"], exported["output"], published["to"]):
        assert "--trust-remote-code" in says("generate", made, *asked, code=2)["error"]["message"]
        assert says("generate", made, *asked, "--trust-remote-code") == [text]
    card = (Path(published["to"]) / "README.md").read_text()
    assert "library_name: llmtrain" in card
    assert "The code of my_pkg.models:Convolution is not published" in card
    wrong = says("train", "my.yaml", *keys, *tuning, "model.options.width=16", code=2)["error"]["message"]
    assert "is my_pkg.models:Convolution with options {'width': 32}" in wrong


@pytest.mark.processes
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_train_it_as_one_does(folder: Path, says: Says, strategy: str) -> None:
    keys = [*LITTLE, "trainer.global_batch_size=8", "trainer.max_steps=4", "trainer.eval_every_steps=null"]
    one = says("train", "my.yaml", *keys, "output.run_id=one")
    command = [sys.executable, "-m", "llmtrain", "train", "my.yaml", *keys, "output.run_id=two", "--nproc", "2"]
    done = subprocess.run(
        [*command, f"distributed.strategy={strategy}", "--json"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)
    assert two["world_size"] == 2
    assert two["last_loss"] == pytest.approx(one["last_loss"], rel=1e-4)
    assert says("eval", "two")["loss"] == pytest.approx(says("eval", "one")["loss"], rel=1e-4)
