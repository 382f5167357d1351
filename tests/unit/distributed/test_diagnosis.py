"""What is in the way of training on a machine, by its system, devices and network, and the fix that is named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from llmtrain.distributed.diagnosis import (
    CudaDevice,
    Finding,
    device_findings,
    network_findings,
    system_findings,
)
from tests.support.machines import GOOD_MACHINE


def only(environ: Mapping[str, str] | None = None, **different: Any) -> Finding:
    facts, environ = replace(GOOD_MACHINE, **different), environ or {}
    (finding,) = [*system_findings(facts, environ), *device_findings(facts), *network_findings(facts, environ)]
    assert finding.fix
    return finding


def test_a_missing_compiler_is_a_warning_that_says_what_to_install() -> None:
    found = only(missing_for_compile="no C++ compiler was found (install g++ or name one in CXX)")
    assert found.severity == "warning"
    assert found.what == "torch.compile is off, so a run takes about twice as long: no C++ compiler was found"
    assert found.fix == "install g++ or name one in CXX"


def test_a_cpu_without_bf16_is_a_warning_only_without_a_gpu() -> None:
    found = only(bf16_on_cpu=False)
    assert (found.severity, "bf16" in found.what) == ("warning", True)
    gpu = CudaDevice(name="NVIDIA A100", memory_bytes=80 * 10**9, capability=(8, 0), bf16=True)
    assert device_findings(replace(GOOD_MACHINE, bf16_on_cpu=False, gpus=[gpu])) == []


def test_windows_is_fatal_and_the_fix_is_wsl() -> None:
    found = only(system="Windows")
    assert (found.severity, "WSL2" in found.fix) == ("fatal", True)


def test_a_driver_without_a_gpu_in_torch_is_fixed_by_another_build() -> None:
    assert "build of torch for CUDA" in only(nvidia_driver=True, cuda_built=False).fix
    assert "nvidia-smi" in only(nvidia_driver=True).fix


@pytest.mark.parametrize(
    ("capability", "fix"), [((6, 1), "trainer.compile=false"), ((7, 5), "trainer.precision=16-mixed")]
)
def test_old_gpus_are_warnings_that_name_the_keys_to_set(capability: tuple[int, int], fix: str) -> None:
    gpu = CudaDevice(name="NVIDIA old", memory_bytes=10**10, capability=capability, bf16=False)
    assert only(gpus=[gpu]).fix.startswith(fix)


def test_omp_num_threads_below_the_usable_cores_is_a_warning() -> None:
    found = only({"OMP_NUM_THREADS": "1"}, threads=1)
    assert found.what == "OMP_NUM_THREADS=1 lets a run on the CPU use 1 of 8 cores"


def test_a_network_interface_that_does_not_exist_is_a_warning() -> None:
    found = only({"NCCL_SOCKET_IFNAME": "ib0"})
    assert found.what == "NCCL_SOCKET_IFNAME=ib0 matches no network interface of this machine"
    assert found.fix == "name one of eth0, lo, or unset it"
