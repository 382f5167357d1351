"""`make bench-gpu` as it runs on a GPU, but with tiny sizes on a CPU: every section, every check, one document."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.processes]

ROOT = Path(__file__).parents[2]


def test_the_whole_kit_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    # Many times what it takes: on a busy machine no section may be cut.
    command = [sys.executable, "-m", "benchmarks.gpu", "--smoke", "--seconds", "3000", "--out", str(out)]
    done = subprocess.run(
        [*command, "--wheels", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        timeout=550,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    document = json.loads(done.stdout)
    assert document == json.loads(out.read_text())
    assert document["passed"]
    assert document["machine"]["torch"]
    sections = document["sections"]
    assert {name: section["state"] for name, section in sections.items()} == dict.fromkeys(
        ["ceilings", "correctness", "torchrun", "attention", "speeds", "tuning", "peers"], "done"
    )
    checks = [check for section in sections.values() for check in section["checks"]]
    assert len(checks) == 25
    for check in checks:
        assert check["value"] <= check["limit"], check
    assert [row for name in ("speeds", "tuning", "peers") for row in sections[name]["rows"] if "error" in row] == []
    for row in (*sections["speeds"]["rows"], *sections["tuning"]["rows"]):
        assert row["tokens_per_sec"] > 0, row
        assert row["kernels"], row
    assert {row["peer"] for row in sections["peers"]["rows"] if row["ours_over_it"] > 0} == {
        "Trainer",
        "peft",
        "peft, recomputing",
        "TRL, packed",
    }
    assert {row["kind"] for row in sections["attention"]["rows"]} == {"causal", "dense", "varlen", "flex"}
    assert "== correctness: done" in done.stderr
