"""`doctor` judges a machine by all its findings, and asks this one without telling its secrets."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from llmtrain.installing import install_requirements
from llmtrain.verbs import doctor as verb
from llmtrain.verbs.doctor import Facts, examine, gather
from tests.support.machines import GOOD_DISKS, GOOD_MACHINE, RUNS

GOOD = Facts(
    cpu="a CPU",
    machine=GOOD_MACHINE,
    disks=GOOD_DISKS,
    secrets={"HF_TOKEN": False},
    versions={
        **dict.fromkeys(("lightning-fabric", "transformers", "tokenizers", "safetensors", "pyarrow"), "9.9"),
        "python": "3.12.1",
        "torch": "2.13.0+cpu",
    },
    environment={},
)
UNWRITABLE = replace(GOOD, disks=replace(GOOD_DISKS, runs=replace(RUNS, writable=False)))


def test_a_good_machine_has_no_findings() -> None:
    assert examine(GOOD) == []


@pytest.mark.parametrize(
    ("package", "here", "message"),
    [
        ("torch", "2.9.1+cu128", "torch is 2.9.1+cu128, and 2.10 is needed"),
        ("torch", None, "torch is not installed, and 2.10 is needed"),
        ("python", "3.10.4", "python is 3.10.4, and 3.11 is needed"),
        ("pyarrow", None, "pyarrow is not installed"),
    ],
)
def test_versions_that_are_too_old_or_missing(package: str, here: str | None, message: str) -> None:
    (found,) = examine(replace(GOOD, versions=GOOD.versions | {package: here}))
    assert (found.severity, found.what) == ("fatal", message)
    assert found.fix


def test_the_worst_comes_first() -> None:
    found = examine(replace(UNWRITABLE, machine=replace(GOOD_MACHINE, bf16_on_cpu=False)))
    assert [finding.severity for finding in found] == ["fatal", "warning"]


def test_secrets_are_present_or_not_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text("hf_stored")
    environ = {
        "HF_HOME": str(tmp_path / "hub"),
        "HF_TOKEN": "hf_given",
        "NCCL_DEBUG": "INFO",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "RANK": "0",
        "UNRELATED": "x",
    }
    facts = gather(Path("runs"), environ=environ)
    assert facts.secrets["HF_TOKEN"] is facts.secrets["hf_login"] is True
    assert facts.secrets["WANDB_API_KEY"] is False
    assert facts.environment == {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "NCCL_DEBUG": "INFO", "RANK": "0"} | (
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"} if facts.machine.gpus else {}
    )
    assert "hf_" not in repr(facts).replace("hf_login", "")


def test_the_command_exits_by_whether_training_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    slow = replace(GOOD, machine=replace(GOOD_MACHINE, missing_for_compile="no compiler (install g++)"))
    monkeypatch.setattr(verb, "gather", lambda root: slow)
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["can_train"] is True
    assert [finding["fix"] for finding in document["findings"]] == ["install g++"]
    assert set(document) >= {"cpu", "gpus", "runs", "secrets", "versions", "environment", "missing_for_compile"}
    monkeypatch.setattr(verb, "gather", lambda root: UNWRITABLE)
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["can_train"] is False
    assert run(["doctor"]) == 1
    page = capfd.readouterr().out
    assert "✗ /data/runs cannot be written\n  → give another output.root_dir" in page
    assert page.endswith("It cannot train.\n")


def test_a_package_that_is_missing_altogether_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightning_fabric", None)
    monkeypatch.delitem(sys.modules, "llmtrain.verbs.doctor")
    monkeypatch.delitem(sys.modules, "llmtrain.distributed.diagnosis")
    monkeypatch.delitem(sys.modules, "llmtrain.distributed.engine")
    assert run(["doctor"]) == 1
    assert capfd.readouterr().err == f"error: lightning_fabric is not installed: {install_requirements()}\n"
