from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from llmtrain.tracking.gpus import GPU_OPTIONS, device_peak_flops, find_gpu

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def _matmul_precision() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


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
    gpu = find_gpu(name)

    assert gpu is not None
    assert gpu.bf16 == bf16


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
def test_a_part_of_a_gpu_and_an_unknown_one_have_no_peak(name: str) -> None:
    assert find_gpu(name) is None


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


def test_every_gpu_that_plan_offers_is_found_by_its_full_name_and_has_memory() -> None:
    for option, gpu in GPU_OPTIONS.items():
        assert find_gpu(gpu.full_name) is gpu, option
        assert gpu.memory_gb > 0, option
