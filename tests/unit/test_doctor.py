"""What `doctor` makes of a machine, and that it asks this one without telling its secrets."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from llmtrain.cli.app import run
from llmtrain.recipes import doctor as recipe
from llmtrain.recipes.doctor import Facts, Finding, Gpu, RunsFolder, examine, gather, look_at_folder

RUNS = RunsFolder(path="/data/runs", free_bytes=10**12, writable=True, lacks=[])
GOOD = Facts(
    system="Linux",
    is_wsl=False,
    cpu="a CPU",
    cores=8,
    threads=8,
    memory_bytes=32 * 10**9,
    gpus=[],
    mps=False,
    cuda_built=True,
    nvidia_driver=False,
    bf16_on_cpu=True,
    missing_for_compile=None,
    runs=RUNS,
    cache="/home/user/.cache/huggingface",
    cache_free_bytes=10**12,
    secrets={"HF_TOKEN": False},
    versions={
        **dict.fromkeys(("lightning", "transformers", "tokenizers", "safetensors", "pyarrow"), "9.9"),
        "python": "3.12.1",
        "torch": "2.13.0+cpu",
    },
    interfaces=["eth0", "lo"],
    adapters=[],
    environment={},
)


def only(facts: Facts) -> Finding:
    (finding,) = examine(facts)
    assert finding.fix
    return finding


def test_a_good_machine_has_no_findings() -> None:
    assert examine(GOOD) == []


def test_no_compiler_is_slow_and_says_what_to_install() -> None:
    found = only(replace(GOOD, missing_for_compile="no C++ compiler was found (install g++ or name one in CXX)"))
    assert found.severity == "warning"
    assert found.what == "torch.compile is off, so a run takes about twice as long: no C++ compiler was found"
    assert found.fix == "install g++ or name one in CXX"


def test_a_cpu_without_bf16_matters_where_there_is_no_gpu() -> None:
    found = only(replace(GOOD, bf16_on_cpu=False))
    assert (found.severity, "bf16" in found.what) == ("warning", True)
    gpu = Gpu(name="NVIDIA A100", memory_bytes=80 * 10**9, capability=(8, 0), bf16=True)
    assert examine(replace(GOOD, bf16_on_cpu=False, gpus=[gpu])) == []


@pytest.mark.parametrize(("free_bytes", "severity"), [(3 * 10**9, "warning"), (10**8, "fatal")])
def test_low_disk(free_bytes: int, severity: str) -> None:
    found = only(replace(GOOD, runs=replace(RUNS, free_bytes=free_bytes)))
    assert found.severity == severity
    assert found.what.endswith("GB free at /data/runs")


def test_a_folder_that_cannot_be_written_makes_training_impossible() -> None:
    found = only(replace(GOOD, runs=replace(RUNS, writable=False)))
    assert (found.severity, found.what) == ("fatal", "/data/runs cannot be written")


def test_a_file_system_without_links_is_no_hindrance() -> None:
    found = only(replace(GOOD, runs=replace(RUNS, lacks=["links", "fsync of folders"])))
    assert (found.severity, "lacks links, fsync of folders" in found.what) == ("warning", True)


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
    found = only(replace(GOOD, versions=GOOD.versions | {package: here}))
    assert (found.severity, found.what) == ("fatal", message)


def test_windows_is_sent_to_wsl() -> None:
    found = only(replace(GOOD, system="Windows"))
    assert (found.severity, "WSL2" in found.fix) == ("fatal", True)


def test_a_driver_without_a_gpu_in_torch_names_the_build() -> None:
    found = only(replace(GOOD, nvidia_driver=True, cuda_built=False))
    assert "build of torch for CUDA" in found.fix
    assert "nvidia-smi" in only(replace(GOOD, nvidia_driver=True)).fix


@pytest.mark.parametrize(
    ("capability", "fix"), [((6, 1), "trainer.compile=false"), ((7, 5), "trainer.precision=16-mixed")]
)
def test_old_gpus_get_the_keys_that_help(capability: tuple[int, int], fix: str) -> None:
    gpu = Gpu(name="NVIDIA old", memory_bytes=10**10, capability=capability, bf16=False)
    assert only(replace(GOOD, gpus=[gpu])).fix.startswith(fix)


def test_threads_that_the_environment_holds_back() -> None:
    found = only(replace(GOOD, threads=1, environment={"OMP_NUM_THREADS": "1"}))
    assert found.what == "OMP_NUM_THREADS=1 lets a run on the CPU use 1 of 8 cores"


def test_a_network_interface_that_is_not_there_is_found() -> None:
    found = only(replace(GOOD, environment={"NCCL_SOCKET_IFNAME": "ib0"}))
    assert found.what == "NCCL_SOCKET_IFNAME=ib0 leaves no network interface of this machine"
    assert found.fix == "name one of eth0, lo, or unset it"


def test_the_worst_comes_first() -> None:
    found = examine(replace(GOOD, bf16_on_cpu=False, runs=replace(RUNS, writable=False)))
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
        {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"} if facts.gpus else {}
    )
    assert "hf_" not in repr(facts).replace("hf_login", "")


def test_looking_at_the_runs_leaves_nothing_behind(tmp_path: Path) -> None:
    found = look_at_folder(tmp_path / "not" / "yet")
    assert (found.writable, found.lacks) == (True, [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_that_cannot_sync_folders_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("os.fsync", refuse)
    assert look_at_folder(tmp_path).lacks == ["fsync of folders"]


def test_the_command_exits_by_whether_training_is_possible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe, "gather", lambda root: replace(GOOD, missing_for_compile="no compiler (install g++)"))
    assert run(["doctor", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    assert document["can_train"] is True
    assert [finding["fix"] for finding in document["findings"]] == ["install g++"]
    assert set(document) >= {"cpu", "gpus", "runs", "secrets", "versions", "environment", "missing_for_compile"}
    monkeypatch.setattr(recipe, "gather", lambda root: replace(GOOD, runs=replace(RUNS, writable=False)))
    assert run(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["can_train"] is False
    assert run(["doctor"]) == 1
    page = capfd.readouterr().out
    assert "✗ /data/runs cannot be written\n  → give another output.root_dir" in page
    assert page.endswith("It cannot train.\n")


def test_a_package_that_is_missing_altogether_is_named(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lightning.fabric", None)
    monkeypatch.delitem(sys.modules, "llmtrain.recipes.doctor")
    monkeypatch.delitem(sys.modules, "llmtrain.distributed.engine")
    assert run(["doctor"]) == 1
    assert capfd.readouterr().err == "error: lightning.fabric is not installed: pip install -r requirements.txt\n"
