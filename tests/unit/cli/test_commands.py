"""Each command hands its arguments to a verb, and prints the result."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtrain.cli.app import run
from llmtrain.cli.options import name_resume
from llmtrain.config.loading.load import load_config, to_yaml
from llmtrain.config.sections.schema import Config
from llmtrain.verbs.inspect import Inspection
from tests.support.recorded_run import recorded_run

Calls = list[tuple[tuple[Any, ...], dict[str, Any]]]


def stub(monkeypatch: pytest.MonkeyPatch, verb: str, result: object) -> Calls:
    """Put a verb that notes its arguments in the place of the real one, which needs torch."""
    calls: Calls = []

    def call(*args: Any, **options: Any) -> object:
        calls.append((args, options))
        return result

    module = ModuleType(f"llmtrain.verbs.{verb}")
    setattr(module, verb, call)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert run(list(argv)) == 0
    return capsys.readouterr().out


def test_validate_shows_what_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "validate", "quickstart").splitlines() == [
        "quickstart is valid",
        "  model: decoder, 4 layers, 256 wide",
        "  training: 450 steps of 16 (on each device) × 256 tokens from data/stdlib/train, muon at 0.003, wsd schedule",
    ]
    document = json.loads(printed(capsys, "validate", "--json", "quickstart"))
    assert (document["valid"], document["config"], len(document["summary"])) == (True, "quickstart", 2)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["trainer.max_steps=null"], "10,000 steps"),
        (["trainer.max_steps=null", "trainer.max_epochs=0.5"], "0.5 epochs"),
        (["trainer.max_steps=null", "trainer.max_tokens=1e9"], "1,000,000,000 tokens"),
        (["trainer.global_batch_size=32"], "450 steps of 32 × 256"),
        (["trainer.grad_accum_steps=4"], "of 64 (on each device)"),
        (["data.name=synthetic"], "from random tokens"),
        (["data.train=[a, b, c]"], "from a and 2 more"),
        (["data.train=[{path: a, weight: 1}]"], "from a,"),
    ],
)
def test_the_summary_follows_the_config(overrides: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert told in printed(capsys, "validate", "quickstart", *overrides)


def test_config_may_come_first_or_after_an_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lr=3.json"
    file.write_text('{"data": {"name": "synthetic"}}')
    for argv in (
        [str(file), "run.seed=5"],
        ["--config", str(file), "run.seed=5"],
        ["run.seed=5", "--config", str(file)],
        [f"--config={file}", "run.seed=4", "run.seed=5"],
    ):
        assert json.loads(printed(capsys, "print-config", "--json", *argv))["run"]["seed"] == 5


def test_print_config_prints_a_config_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "print-config", "quickstart", "trainer.max_steps=7")
    file = tmp_path / "printed.yaml"
    file.write_text(text)
    config = load_config(str(file)).config
    assert config == load_config("quickstart", ["trainer.max_steps=7"]).config
    assert to_yaml(config) == text
    document = json.loads(printed(capsys, "print-config", "quickstart", "--json"))
    assert Config.model_validate(document) == load_config("quickstart").config


def test_the_schema_is_one_json_document_with_and_without_json(capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.loads(printed(capsys, "print-config", "--schema"))
    assert schema["title"] == "Config"
    assert json.loads(printed(capsys, "print-config", "--schema", "--json")) == schema


def test_list_configs_lists_the_shipped_configs(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split(maxsplit=1) for line in printed(capsys, "list-configs").splitlines()]
    assert dict(lines)["quickstart"].startswith("From raw text")
    shipped = json.loads(printed(capsys, "list-configs", "--json"))
    assert [one["name"] for one in shipped] == [name for name, _ in lines]


def test_prepare_passes_the_config_to_its_verb(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub(monkeypatch, "prepare", {"output": "data/stdlib", "documents": 1800, "tokens": 7654321})
    out = printed(capsys, "prepare", "quickstart", "prepare.shard_size=1e6")
    assert calls[0][0][0].config.prepare.shard_size == 1_000_000
    assert out == "shards     data/stdlib\ndocuments  1,800\ntokens     7,654,321\n"


def test_prepare_without_its_section_is_a_config_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("data: {name: synthetic}\n")
    assert run(["prepare", str(file)]) == 2
    assert f"{file} has no prepare section" in capsys.readouterr().err


def test_train_passes_config_overrides_and_the_run_to_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub(monkeypatch, "train", {"run": "runs/x", "steps": 900, "val_loss": 1.25, "tokens_per_sec": 5210.4})
    out = printed(capsys, "train", "quickstart", "trainer.max_steps=5")
    (loaded,), options = calls[0]
    assert loaded.source == "quickstart"
    assert loaded.config.trainer.max_steps == 5
    assert options == {"resume": None, "overrides": ["trainer.max_steps=5"], "dry_run": False}
    assert out == "run              runs/x\nsteps            900\nvalidation loss  1.25\ntokens/s         5,210\n"


@pytest.mark.parametrize(
    ("argv", "resume", "source"),
    [
        (["--resume"], "latest", None),
        (["--resume", "--json"], "latest", None),
        (["--resume", "20260101-abc"], "20260101-abc", None),
        (["--resume=runs/x/checkpoints/step_000500"], "runs/x/checkpoints/step_000500", None),
        (["quickstart", "--resume"], "latest", "quickstart"),
        (["--resume", "run-1", "quickstart"], "run-1", "quickstart"),
        (["--resume", "trainer.max_steps=5"], "latest", None),
        (["trainer.max_steps=5", "--resume", "run-1"], "run-1", None),
    ],
)
def test_resume_takes_a_run_or_the_newest(
    argv: list[str],
    resume: str,
    source: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = stub(monkeypatch, "train", {})
    printed(capsys, "train", *argv)
    (loaded,), options = calls[0]
    assert options["resume"] == resume
    assert (loaded.source if loaded else None) == source
    assert options["overrides"] == [word for word in argv if "max_steps" in word]


def test_only_train_has_a_resume_without_a_name() -> None:
    assert name_resume(["generate", "--resume"]) == ["generate", "--resume"]
    assert name_resume(["train", "--resume", "my.yaml"]) == ["train", "--resume=latest", "my.yaml"]
    assert name_resume([]) == []


def test_a_dry_run_prints_its_losses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    result = {"dry_run": True, "losses": [9.01, 9.02], "planned_steps": 900}
    calls = stub(monkeypatch, "train", result)
    out = printed(capsys, "train", "quickstart", "--dry-run")
    assert calls[0][1]["dry_run"] is True
    assert out == "dry run: 2 forward steps, losses 9.01, 9.02; a run would take 900 steps\n"


def test_eval_passes_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = stub(monkeypatch, "evaluate", {"model": "runs/x/model", "loss": 1.5, "perplexity": 4.4817})
    out = printed(capsys, "eval")
    assert calls[0] == (
        (None,),
        {"config": None, "overrides": [], "settings": {}, "steps": None, "root_dir": None},
    )
    assert out == "model       runs/x/model\nloss        1.5\nperplexity  4.482\n"
    options = ["--data", "a", "--data", "b", "--steps", "3", "--batch-size", "4", "--root-dir", "r", "--no-baseline"]
    printed(capsys, "eval", "run-1", "evaluation.chat=true", *options, "--config", "c.yaml", "--temperature", "0")
    assert calls[1] == (
        ("run-1",),
        {
            "config": "c.yaml",
            "overrides": ["evaluation.chat=true"],
            "settings": {"data": ["a", "b"], "baseline": None, "temperature": 0.0, "batch_size": 4},
            "steps": 3,
            "root_dir": "r",
        },
    )
    printed(capsys, "eval", "run.seed=3")
    assert calls[2][0] == (None,)
    assert calls[2][1]["overrides"] == ["run.seed=3"]
    assert run(["eval", "--baseline", "a", "--no-baseline"]) == 2


def test_generate_passes_its_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    results = [{"prompt": "def f(", "completion": "x): return x"}, {"prompt": "a", "completion": " = 1"}]
    calls = stub(monkeypatch, "generate", results)
    assert (
        printed(capsys, "generate", "run-1", "--prompt", "def f(", "--prompt", "a") == "def f(x): return x\n\na = 1\n"
    )
    assert calls[0] == (
        ("run-1",),
        {
            "prompts": ["def f(", "a"],
            "prompts_file": None,
            "output": None,
            "max_new_tokens": 128,
            "temperature": 0.8,
            "top_k": None,
            "top_p": None,
            "repetition_penalty": 1.0,
            "seed": 1337,
            "stop": [],
            "stop_tokens": [],
            "heal": True,
            "chat": None,
            "batch_size": 16,
            "device": "auto",
            "root_dir": "runs",
            "trust_remote_code": False,
        },
    )
    assert json.loads(printed(capsys, "generate", "run-1", "--prompt", "a", "--json")) == results


@pytest.mark.parametrize("argv", [[], ["--prompt", "-"]])
def test_generate_reads_its_prompt_from_stdin(
    argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub(monkeypatch, "generate", [])
    monkeypatch.setattr(sys, "stdin", io.StringIO("import os\n\n"))
    printed(capsys, "generate", *argv)
    assert calls[0][0] == ("latest",)
    assert calls[0][1]["prompts"] == ["import os\n"]


def test_generate_with_a_file_of_prompts_reads_no_stdin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = stub(monkeypatch, "generate", [{"prompt": "a", "completion": "b"}])
    argv = ["--prompts", "p.txt", "--output", "o.jsonl", "--stop", "x", "--stop", "y", "--stop-token", "z", "--no-heal"]
    assert printed(capsys, "generate", *argv) == "o.jsonl: 1 text\n"
    options = calls[0][1]
    assert (options["prompts"], options["prompts_file"], options["output"]) == ([], "p.txt", "o.jsonl")
    assert (options["stop"], options["stop_tokens"], options["heal"]) == (["x", "y"], ["z"], False)


def test_interactive_takes_no_other_prompts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "--interactive", "--prompt", "a"]) == 2
    assert "remove --prompt, --prompts and --output" in capsys.readouterr().err


def test_a_run_is_printed_validated_and_inspected_by_its_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run_folder = recorded_run(tmp_path / "elsewhere", "one", lr=0.125)
    root = "output.root_dir=elsewhere"
    printed_config = printed(capsys, "print-config", "one", root)
    assert "lr: 0.125" in printed_config
    assert printed(capsys, "print-config", str(run_folder), root) == printed_config
    assert printed(capsys, "validate", "one", root).startswith(f"{run_folder / 'config.yaml'} is valid")
    calls = stub(monkeypatch, "inspect", Inspection("rows", {"name": "x"}, has_faults=False))
    monkeypatch.setattr("llmtrain.cli.inspect._blocks_of", lambda found, split: [])
    printed(capsys, "inspect", str(run_folder))
    assert calls[-1][0][0] == str(run_folder / "config.yaml")
