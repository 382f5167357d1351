"""The predicted peak memory against a run's, in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "14m.yaml"
# Tensors make up more than half of the peak of either.
SHAPES = {
    "eager": ["trainer.compile=false", "trainer.max_steps=2"],
    "checkpointed": ["trainer.compile=false", "trainer.activation_checkpointing=true", "trainer.max_steps=2"],
    "compiled": ["trainer.micro_batch_size=32", "trainer.max_steps=2"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_the_peak_is_predicted_within_ten_percent(name: str, tmp_path: Path) -> None:
    words = [str(BENCHMARK), "run.device=cpu", "data.num_items=100", f"output.root_dir={tmp_path}", *SHAPES[name]]
    predicted = _call("plan", *words)["memory"]["peak_bytes"]
    measured = _call("train", *words)["peak_memory_bytes"]
    assert predicted == pytest.approx(measured, rel=0.10)


def _call(*words: str) -> Any:
    command = [sys.executable, "-m", "llmtrain", *words, "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
