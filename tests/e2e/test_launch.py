"""`train --nproc N`: the same run as under torchrun, and one exit code for all that keeps the contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from llmtrain.config.loading.load import load_config
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train
from tests.support.tiny_run import weight_hash

pytestmark = [pytest.mark.slow, pytest.mark.processes]

KEYS = ["trainer.max_steps=12", "model.dropout=0", "trainer.micro_batch_size=2"]


def start(*arguments: str, faults: str = "", nproc: int = 2) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "llmtrain", "train", *arguments, "--nproc", str(nproc)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env={**os.environ, "LLMTRAIN_FAULTS": faults}, **pipes)  # type: ignore[call-overload, no-any-return]


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=200)
    return process.returncode, out, err


def wait_for(path: Path, *, num_bytes: int = 1) -> None:
    for _ in range(1200):
        if path.exists() and path.stat().st_size >= num_bytes:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


def kill_after_save(point: str, *, saved: Path) -> str:
    """A kill at `point` that waits until the checkpoint `saved` exists, since saves end in the background."""
    return f"wait@step:{saved}:{point}, kill@step:{point}"


def test_two_processes_train_as_one_and_print_one_document(config_file: Path, undisturbed: Callable[..., str]) -> None:
    keys = [*KEYS, "trainer.save_every_steps=6"]
    one = train(load_config(str(config_file), [*keys, "trainer.micro_batch_size=4", "output.run_id=one"]))
    code, out, err = finish(start(str(config_file), *keys, "output.run_id=two", "--json"))
    assert code == 0, err
    two = json.loads(out)
    assert (two["world_size"], two["tokens"]) == (2, one["tokens"])
    assert two["last_loss"] == pytest.approx(one["last_loss"], abs=1e-5)
    assert weight_hash(config_file.parent / "runs" / "two") == undisturbed(*KEYS, world_size=2)
    assert "OMP_NUM_THREADS" not in err, "torchrun's own warning is no news"


def test_a_mistake_is_2_and_one_document(config_file: Path) -> None:
    code, out, err = finish(start(str(config_file), "trainer.global_batch_size=20", "--json"))
    assert code == 2, err
    assert json.loads(out)["error"]["exit_code"] == 2
    assert "set it to" in json.loads(out)["error"]["message"]


def test_sigterm_to_the_launcher_saves_once_and_ends_with_75_and_the_run_goes_on(
    config_file: Path, undisturbed: Callable[..., str]
) -> None:
    process = start(str(config_file), *KEYS, "output.run_id=stopped", faults="sleep@step:0.3")
    run = config_file.parent / "runs" / "stopped"
    wait_for(run / "metrics.jsonl", num_bytes=300)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err
    assert 0 < len(read_metrics(run / "metrics.jsonl")) < 12
    code, _, err = finish(start(f"--resume={run}"))
    assert code == 0, err
    assert weight_hash(run) == undisturbed(*KEYS, world_size=2)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGHUP, 75), (signal.SIGKILL, -signal.SIGKILL)])
def test_a_launcher_that_goes_leaves_nothing_running_and_the_run_saved(
    config_file: Path, number: signal.Signals, code: int
) -> None:
    process = start(str(config_file), *KEYS, "output.run_id=left", faults="sleep@step:0.3")
    run = config_file.parent / "runs" / "left"
    wait_for(run / "metrics.jsonl", num_bytes=300)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert finish(process)[0] == code
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive
    summary = json.loads((run / "summary.json").read_text())
    assert summary["state"] == "preempted"
    assert (run / "checkpoints" / f"step_{summary['steps']:06d}").is_dir()


def test_a_killed_process_makes_the_others_end_and_the_code_is_75(config_file: Path) -> None:
    process = start(str(config_file), *KEYS, "output.run_id=lost", faults="sleep@step:0.2")
    wait_for(config_file.parent / "runs" / "lost" / "metrics.jsonl")
    workers = psutil.Process(process.pid).children(recursive=True)
    victim = next(worker for worker in workers if worker.environ().get("RANK") == "1")
    victim.send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert code == 75, err


def test_the_group_starts_again_and_ends_as_if_nothing_had_happened(
    config_file: Path, undisturbed: Callable[..., str]
) -> None:
    saves = ["trainer.save_every_steps=4", "output.run_id=again", "--max-restarts=2", "--json"]
    step_8 = config_file.parent / "runs" / "again" / "checkpoints" / "step_000008"
    kills = f"{kill_after_save('step=9:rank=1:restart=0', saved=step_8)}, kill@step:step=11:rank=0:restart=1"
    code, out, err = finish(start(str(config_file), *KEYS, *saves, faults=kills))
    assert code == 0, err
    assert json.loads(out)["resumed_from_step"] == 8
    assert weight_hash(config_file.parent / "runs" / "again") == undisturbed(*KEYS, world_size=2)
    assert not (config_file.parent / "runs" / "again" / "attempts.json").exists()


def test_four_processes_that_cut_parameters_start_again_too(config_file: Path, undisturbed: Callable[..., str]) -> None:
    keys = [*KEYS, "trainer.micro_batch_size=1", "trainer.save_every_steps=4", "distributed.strategy=fsdp"]
    again = [*keys, "output.run_id=again", "--max-restarts=1", "--json"]
    step_8 = config_file.parent / "runs" / "again" / "checkpoints" / "step_000008"
    kill = kill_after_save("step=9:rank=3:restart=0", saved=step_8)
    code, out, err = finish(start(str(config_file), *again, faults=kill, nproc=4))
    assert code == 0, err
    assert json.loads(out)["resumed_from_step"] == 8
    assert weight_hash(config_file.parent / "runs" / "again") == undisturbed(*keys, world_size=4)


def test_restarts_that_do_not_get_on_end_with_42(config_file: Path) -> None:
    saves = ["trainer.save_every_steps=4", "output.run_id=loop", "--max-restarts=9"]
    step_4 = config_file.parent / "runs" / "loop" / "checkpoints" / "step_000004"
    kill = kill_after_save("step=6:rank=1", saved=step_4)
    code, _, err = finish(start(str(config_file), *KEYS, *saves, faults=kill))
    assert code == 42, err
    assert "started 3 times from step_000004" in err


def test_a_mistake_that_the_processes_find_is_not_tried_again(config_file: Path) -> None:
    began = time.monotonic()
    code, _, err = finish(start(str(config_file), "trainer.micro_batch_size=99999", "--max-restarts=9"))
    assert code == 2, err
    assert err.count("error: the training data has") == 2, "once on each rank"
    assert time.monotonic() - began < 100
