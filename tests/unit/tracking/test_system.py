from __future__ import annotations

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch

from llmtrain.tracking.gpus import device_peak_flops
from llmtrain.tracking.system import model_flops_utilisation, peak_memory_bytes


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


def test_a_cpu_has_no_peak_and_so_no_mfu() -> None:
    peak = device_peak_flops(torch.device("cpu"), precision="bf16-mixed")

    assert peak is None
    assert model_flops_utilisation(1e3, flops_per_token=1e9, peak_flops=peak, num_devices=1) is None


def test_mfu_counts_all_devices() -> None:
    mfu = model_flops_utilisation(800_000, flops_per_token=6 * 124e6, peak_flops=989e12, num_devices=2)

    assert mfu == pytest.approx(800_000 * 744e6 / 1978e12)
    assert mfu == pytest.approx(0.3009, abs=1e-4)


def test_an_mfu_over_100_percent_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("llmtrain").propagate = True
    mfu = model_flops_utilisation(2e6, flops_per_token=1e9, peak_flops=989e12, num_devices=1)

    assert mfu is None
    assert "it would be 202 %, so the speed or the device's peak is wrong" in caplog.text
