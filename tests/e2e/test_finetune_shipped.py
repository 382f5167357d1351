"""A fine-tuning by one command, with a config that ships: no file of the user's own but the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from llmtrain.cli.app import run
from tests.support.chat import CHATML, tiny_chat_tokenizer
from tests.support.tiny_huggingface import tiny_network


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tokenizer = tiny_chat_tokenizer(CHATML)
    tokenizer.save_pretrained(folder)
    tiny_network("llama", vocab_size=len(tokenizer), max_position_embeddings=1024).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    asked = [{"prompt": f"What is {number}?", "completion": f"It is {number}."} for number in range(1300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return file


@pytest.mark.slow
@pytest.mark.parametrize("name", ["finetune-lora", "finetune-full"])
def test_a_run_needs_no_file_of_the_users_own(
    name: str,
    base: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    documented = [
        f"model.path={base}",
        f"data.train={rows}",
        f"output.root_dir={tmp_path / 'out'}",
        "output.run_id=one",
    ]
    smaller = ["trainer.compile=false", "run.device=cpu", "optimizer.lr=0.01", f"data.cache_dir={tmp_path / 'cache'}"]
    assert run(["train", name, *documented, *smaller, "--json"]) == 0
    summary = json.loads(capfd.readouterr().out)
    assert summary["state"] == "finished"
    assert summary["run"] == str(tmp_path / "out" / "one")
    assert (summary["parameters"]["trainable"] < summary["parameters"]["total"]) is (name == "finetune-lora")
    assert summary["val_loss"] < summary["first_loss"]
    folder = Path(summary["model"])
    assert (folder / "chat_template.jinja").exists()
    assert (folder / "adapter_config.json").exists() is (name == "finetune-lora")
    AutoModelForCausalLM.from_pretrained(folder)  # with peft installed, an adapter with its base


@pytest.mark.slow
def test_the_model_may_be_the_newest_run_of_a_name(
    base: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    common = [f"data.train={rows}", "trainer.compile=false", "run.device=cpu", f"data.cache_dir={tmp_path / 'cache'}"]
    common += ["trainer.max_epochs=1", "--json"]
    assert run(["train", "finetune-full", f"model.path={base}", "run.name=quickstart", *common]) == 0
    first = json.loads(capfd.readouterr().out)
    local = ["data.val=null", "trainer.max_epochs=null", "trainer.max_steps=3", "trainer.micro_batch_size=2"]
    assert run(["plan", "finetune-local", *common, *local]) == 0
    assert json.loads(capfd.readouterr().out)["parameters"]["total"] > first["parameters"]["total"]
    assert run(["inspect", "finetune-local", *common, *local]) == 0
    capfd.readouterr()
    assert run(["train", "finetune-local", *common, *local]) == 0
    second = json.loads(capfd.readouterr().out)
    described = json.loads((Path(second["model"]) / "adapter_config.json").read_text())
    assert described["base_model_name_or_path"] == str(Path(first["model"]).resolve())
