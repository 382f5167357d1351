"""The parent of the GPU benchmark with sections that measure nothing: crashes, limits in time, checks, the table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.document import Document, Skipped, read_document
from benchmarks.gpu.parent import BenchSection, run_sections, table_of

ROOT = Path(__file__).parents[3]
LONG = "import time; time.sleep(600)"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "gpu.json"


def section(name: str, body: str, file: Path, *, seconds: float = 20.0, has_checks: bool = False) -> BenchSection:
    begin = "from pathlib import Path; from benchmarks.gpu.document import Recorder, Skipped"
    begin += f"; r = Recorder(Path({str(file)!r}), {name!r})"
    command = [sys.executable, "-c", f"{begin}\n{body}"]
    return BenchSection(name=name, seconds=seconds, command=command, has_checks=has_checks)


def run(file: Path, *sections: BenchSection, seconds: float = 60.0) -> Document:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return run_sections(sections, file, seconds=seconds, environment=environment, header={"benchmark": "gpu"})


def state(document: Document) -> dict[str, Any]:
    return {name: section["state"] for name, section in document["sections"].items()}


def test_a_crash_is_reported_and_loses_neither_its_own_results_nor_other_sections(file: Path) -> None:
    document = run(
        file,
        section("first", "r.row(case='a', tokens_per_sec=12.5)\nraise ValueError('no luck')", file),
        section("second", "r.check('holds', value=0.5, limit=1.0)", file, has_checks=True),
    )
    assert state(document) == {"first": "crashed", "second": "done"}
    assert document["sections"]["first"]["rows"] == [{"case": "a", "tokens_per_sec": 12.5}]
    assert "no luck" in document["sections"]["first"]["output"]
    assert document["passed"]
    assert document == read_document(file)
    assert [path.name for path in file.parent.iterdir() if path.suffix == ".log"] == ["gpu-first.log"]


def test_a_section_over_its_time_is_cut_with_all_that_it_started(file: Path, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = (
        "import subprocess, sys, pathlib\nr.row(case='kept')\n"
        f"p = subprocess.Popen([sys.executable, '-c', {LONG!r}], start_new_session=True)\n"
        f"pathlib.Path({str(pid_file)!r}).write_text(str(p.pid))\np.wait()"
    )
    document = run(file, section("slow", child, file, seconds=3.5), section("next", "r.row(case='b')", file))
    assert state(document) == {"slow": "cut", "next": "done"}
    assert document["sections"]["slow"]["rows"] == [{"case": "kept"}]
    assert document["sections"]["slow"]["seconds"] == pytest.approx(3.5, abs=1.5)
    assert "== slow: cut" in table_of(document)
    status = Path(f"/proc/{int(pid_file.read_text())}/stat")
    deadline = time.monotonic() + 5
    while status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "what the section started goes on"
        time.sleep(0.05)


def test_time_that_is_left_over_goes_to_later_sections(file: Path) -> None:
    document = run(file, section("quick", "", file, seconds=30.0), section("without", "", file, seconds=0.0))
    assert state(document) == {"quick": "done", "without": "done"}


def test_all_sections_end_in_the_time_for_all(file: Path) -> None:
    document = run(file, section("endless", LONG, file), section("late", "", file), seconds=1.0)
    assert state(document) == {"endless": "cut", "late": "not started"}
    assert document["failures"] == []
    document = run(file, section("endless", LONG, file), section("late", "", file, has_checks=True), seconds=1.0)
    assert document["failures"] == ["late: not started"]


@pytest.mark.parametrize(
    ("body", "failures"),
    [
        ("r.check('a', value=2.0, limit=1.0)", ["checks: a"]),
        ("r.check('a', value=float('nan'), limit=1.0)", ["checks: a"]),
        ("r.checked('a', lambda: 1 / 0, limit=1.0)", ["checks: a"]),
        ("r.check('a', value=1.0, limit=1.0)\nraise SystemExit(3)", ["checks: crashed"]),
        ("r.check('a', value=1.0, limit=1.0)", []),
        ("r.row(case='slow', tokens_per_sec=0.001)", []),
    ],
)
def test_only_checks_decide(file: Path, body: str, failures: list[str]) -> None:
    document = run(file, section("checks", body, file, has_checks=True))
    assert document["failures"] == failures
    assert document["passed"] == (not failures)
    assert ("FAILED" in table_of(document)) == bool(failures)


def test_a_check_that_cannot_be_made_is_skipped_with_its_reason(file: Path) -> None:
    body = "def no(): raise Skipped('bitsandbytes is not installed')\nr.checked('QLoRA', no, limit=1.0)"
    document = run(file, section("checks", body, file, has_checks=True))
    assert document["passed"]
    assert document["sections"]["checks"]["checks"][0]["skipped"] == "bitsandbytes is not installed"
    assert "bitsandbytes is not installed" in table_of(document)


def test_a_row_that_fails_stands_in_the_table_with_its_reason(file: Path) -> None:
    body = (
        "with r.trying(case='a'):\n    raise RuntimeError('No available kernel')\n"
        "with r.trying(case='b'):\n    raise Skipped('needs a GPU')\nr.row(case='c', speed=1234567.0, kernels=[1])"
    )
    document = run(file, section("rows", body, file))
    assert document["sections"]["rows"]["rows"] == [
        {"case": "a", "error": "RuntimeError: No available kernel"},
        {"case": "b", "skipped": "needs a GPU"},
        {"case": "c", "speed": 1234567.0, "kernels": [1]},
    ]
    table = table_of(document)
    assert "1,234,567" in table
    assert "kernels" not in table
    assert issubclass(Skipped, Exception)


def test_without_a_gpu_the_command_says_what_to_do(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "--smoke" in done.stderr


def test_the_document_is_always_json(file: Path) -> None:
    document = run(file, section("rows", "r.row(case='a', value=float('inf'))", file))
    assert json.loads(json.dumps(document, allow_nan=False))["sections"]["rows"]["rows"] == [
        {"case": "a", "value": "inf"}
    ]
