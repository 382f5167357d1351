from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from llmtrain.tracking.system import (
    device_peak_flops,
    model_flops_utilisation,
    peak_memory_bytes,
    peak_of,
)

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_peak_memory_is_real_on_a_cpu_and_stays_when_memory_is_given_back() -> None:
    code = "from llmtrain.tracking.system import peak_memory_bytes as peak; import numpy as np; a = peak();"
    code += "b = np.ones(25_000_000); b = None; print(a, peak())"
    # In a process of its own, started by this larger one, whose peak must not be taken for the child's.
    block = np.ones(40_000_000)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, after = (int(figure) for figure in done.stdout.split())

    assert 5e6 < before < 200e6
    assert 190e6 < after - before < 215e6
    assert peak_memory_bytes(torch.device("cpu")) > block.nbytes


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100-PCIE-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("NVIDIA GeForce RTX 3090 Ti", 80),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla V100-SXM2-16GB", None),
        ("Tesla T4", None),
    ],
)
def test_the_table_knows_a_device_by_the_name_that_torch_gives(name: str, bf16: float | None) -> None:
    peak = peak_of(name)

    assert peak is not None
    assert peak.bf16 == bf16


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA A100-SXM4-40GB MIG 3g.20gb",
        "GRID A100X-10C",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA H100 PCIe something new",
        "NVIDIA Z900",
        "",
    ],
)
def test_part_of_a_device_or_an_unknown_one_has_no_peak(name: str) -> None:
    assert peak_of(name) is None


def test_the_peak_follows_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    torch.set_float32_matmul_precision("highest")

    peaks = {name: device_peak_flops(CUDA, precision=name) for name in ("bf16-mixed", "bf16-true", "16-mixed", "32")}
    torch.set_float32_matmul_precision("high")
    with_tf32 = device_peak_flops(CUDA, precision="32")

    assert peaks == {"bf16-mixed": 312e12, "bf16-true": 312e12, "16-mixed": 312e12, "32": 19.5e12}
    assert with_tf32 == 156e12


def test_a_device_without_bf16_has_no_peak_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100-SXM2-16GB")

    assert device_peak_flops(CUDA, precision="bf16-mixed") is None
    assert device_peak_flops(CUDA, precision="16-mixed") == 125e12


def test_a_cpu_has_no_peak_and_so_no_mfu() -> None:
    peak = device_peak_flops(torch.device("cpu"), precision="bf16-mixed")

    assert peak is None
    assert model_flops_utilisation(1e3, flops_per_token=1e9, peak_flops=peak, num_devices=1) is None


def test_mfu_counts_all_devices() -> None:
    mfu = model_flops_utilisation(800_000, flops_per_token=6 * 124e6, peak_flops=989e12, num_devices=2)

    assert mfu == pytest.approx(800_000 * 744e6 / 1978e12)
    assert mfu == pytest.approx(0.3009, abs=1e-4)


def test_an_mfu_over_100_percent_is_left_out_and_said(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("llmtrain").propagate = True
    mfu = model_flops_utilisation(2e6, flops_per_token=1e9, peak_flops=989e12, num_devices=1)

    assert mfu is None
    assert "202 % of the device's peak cannot be" in caplog.text
