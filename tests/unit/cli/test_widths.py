"""What commands print at 80 and at 60 columns: whole words and readable rows, in a pipe and on a terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmtrain.cli.app import VERBS, run
from llmtrain.screen import columns_of
from tests.support.planted import planted_evaluation
from tests.support.recorded_run import recorded_run

IDS = ("20261121-083912-15083ae-quickstart", "20261122-101500-0f1e2d3-quickstart-wide")
RUN_RESULT = {
    "run": "/home/somebody/experiments/llmtrain/runs/20261121-083912-15083ae-quickstart",
    "model": "/home/somebody/experiments/llmtrain/runs/20261121-083912-15083ae-quickstart/model",
    "steps": 450,
    "tokens": 1_843_200,
    "first_loss": 9.0123,
    "val_bits_per_byte": 1.321,
}
COMPARED = {"base": 16.55, "tuned": 5.88, "difference": -10.67, "low": -11.38, "high": -9.992}
EVALUATION = {
    **planted_evaluation("rows"),
    "model": "runs/20261121-083912-15083ae-quickstart/checkpoints/step_000450/model",
    "baseline": "runs/20261121-083912-15083ae-quickstart/base",
    "output": "runs/20261121-083912-15083ae-quickstart/eval/20261121-100000",
    "files": {},
    "scores": {"loss": 4.162, "bits_per_byte": 5.88, "rougeL": None},
    "comparison": {
        "bits_per_byte": {**COMPARED, "wins": 1030, "losses": 0, "ties": 0, "verdict": "better"},
        "rougeL": {
            **dict.fromkeys(("base", "tuned", "difference", "low", "high")),
            **{"wins": 0, "losses": 0, "ties": 1030, "verdict": "not defined"},
        },
    },
    "got_worse": {"rougeL": [f"data/eval/adversarial.jsonl:{line}" for line in range(17, 23)]},
}
RANK = {"host": "gpu-node-17", "device": "cuda:0", "first_loss": 1.3863, "last_loss": 0.2211, "seconds": 1.24}
CHECKS = {"all_reduce": True, "device": True, "gradients": True, "loss": True}
SMOKE = {"ok": True, "ranks": [{"rank": rank, **RANK, "checks": CHECKS} for rank in range(2)]}
FINDINGS = [
    {
        "severity": "warning",
        "what": "/tmp/experiments/runs has 1.234 GB free, and a checkpoint of this model takes several times as much",
        "fix": "set output.root_dir to a disk with more room, or delete old runs with `llmtrain runs rm RUN`",
    }
]
DOCTOR = {
    "can_train": True,
    "findings": FINDINGS,
    "runs": {"path": "/home/somebody/experiments/llmtrain/runs", "free_bytes": 5e11, "writable": True, "lacks": []},
    "versions": {"llmtrain": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "transformers": "5.23.0", "wandb": None},
    "secrets": {"HF_TOKEN": False, "WANDB_API_KEY": False, "MLFLOW_TRACKING_PASSWORD": True, "hf_login": False},
    "gpus": [{"name": "NVIDIA H200", "memory_bytes": 150e9, "capability": (9, 0), "bf16": True}],
    "system": "Linux-6.8.0-45-generic-x86_64-with-glibc2.39",
    "is_wsl": False,
    "cpu": "AMD EPYC 9654 96-Core Processor",
    "cores": 2,
    "threads": 2,
    "bf16_on_cpu": True,
    "memory_bytes": 64e9,
    "mps": False,
    "missing_for_compile": None,
    "cache": "/home/somebody/.cache/huggingface",
    "cache_free_bytes": 5e11,
    "environment": {"OMP_NUM_THREADS": "2"},
}
PLAN = {
    "parameters": {"embedding": 1_048_576, "attention": 1_310_720, "norms": 2_304, "head": 0}
    | {"total": 4_300_000, "trainable": 4_300_000, "non_embedding": 3_251_424},
    "flops_per_token": 2.87e7,
    "flops": 5.29e13,
    "run": {
        **{"steps": 450, "tokens": 1_843_200, "supervised_share": None},
        **{"tokens_per_step": 4096, "items_per_epoch": 12_000, "epochs": 0.61},
    },
    "mixture": {
        "sources": [
            {
                "source": f"data/{name}/train",
                "by": "tokens",
                "sequences": 9_000,
                "share": 0.5,
                "asked": 0.5,
                "epochs": 1,
            }
            for name in ("web-pages-of-2026", "code")
        ],
        "changes": [{"sequence": 9_000, "what": "stage 1 begins; sequences from now on: data/code/train 100.00%"}],
    },
    "layout": {
        **{"ranks": 2, "strategy": "ddp", "tensor_parallel": 1, "replicas": 1},
        **{"micro_batch_size": 16, "grad_accum_steps": 1, "recomputed_blocks": 0, "reduce_each_micro_batch": False},
        **{"batch_size": 16, "seq_len": 256, "precision": "bf16-mixed", "compile": True},
        "because": "the model, its gradients and the state of the optimizer fit into the memory of each process",
    },
    "memory": {"peak_bytes": 9e8, "parts": {"parameters": 2e7, "activations": 8e8}, "device_bytes": 6e10, "fits": True},
    "time": {"device": "AMD EPYC 9654 96-Core Processor", "tokens_per_sec": 9120.0, "seconds": 202.0},
    "assumed": ["the text has 4,915,200 tokens: its 17,203,112 bytes at the usual 3.5 bytes a token for English"],
}
CONVERTED = {
    **{
        "output": "data/converted-rows.jsonl",
        "rows": 120,
        "copied": 0,
        "converted": 120,
        "skipped": 2,
        "joined": 11,
        "other_splits": {},
    },
    "outputs": [{"name": f"a-rather-long-name-of-a-file-{part}.jsonl", "rows": 40} for part in "abc"],
    "shapes": {"prompt and completion": 100, "conversation": 20},
    "unused": {"metadata.source": {"rows": 17, "first": "exports/2026/conversations.json:4"}},
    "left_out": {"a turn with a role that is not known": 3},
    "skips": [
        {
            "source": f"exports/2026/conversations.json:{row}",
            "reason": "it has no text among its usual fields (text, …)",
        }
        for row in (4, 17)
    ],
}
PUBLISHED = {
    **{"to": "/home/somebody/artifacts/models/20261121-083912-15083ae-quickstart", "license": "apache-2.0"},
    "files": ["README.md", "config.json", "config.yaml", "curves.svg", "generation_config.json", "model.safetensors"],
}
ORIGIN = {
    "kind": "data",
    "name": "data/stdlib",
    "facts": {"read": "1,800 documents of the standard library, 17,203,112 bytes of text, 2,113 files in all"},
    "problems": ["data/stdlib/train/shard-00000.parquet is not what it was when the run read it: its hash is another"],
    "made_from": [],
}
LINEAGE = {
    "lineage": {**ORIGIN, "kind": "run", "name": IDS[0], "problems": [], "made_from": [ORIGIN, ORIGIN]},
    **{"problems": ["one"], "unchanged": False},
}
WAITS = "0/3 nodes are available: 3 Insufficient nvidia.com/gpu. preemption: 0/3 nodes are available"
PODS: list[dict[str, Any]] = [
    {"name": "quickstart-0-x7k2p", "ranks": "ranks 0 to 7", "phase": "Failed", "exit_code": 137}
    | {"cause": "out of memory (OOMKilled): raise kubernetes.memory, or lower trainer.micro_batch_size"},
    {"name": "quickstart-1-9fd4c", "ranks": "ranks 8 to 15", "phase": "Pending", "exit_code": None}
    | {"cause": f"pending, Unschedulable: {WAITS}"},
]
ON_A_CLUSTER = {
    **{"run": "quickstart", "kind": "job", "state": "failed", "step": 120, "loss": 2.125, "exit_code": 1},
    **{"cause": "BackoffLimitExceeded: Job has reached the specified backoff limit of pods", "pods": PODS},
}
APPLIED = [f"{kind}/llmtrain-{name} serverside-applied" for kind in ("service", "job.batch") for name in ("a", "b")]
MACHINE = {
    **{"host": "somebody@gpu-node-17.example.org", "state": "ended", "exit": 75, "name": IDS[0], "free": 5e11},
    **{"gpu": ["H100"] * 8, "run": {"steps": 450, "loss": 2.125, "tokens_per_sec": 912_000.0}},
}
RESULTS: dict[str, tuple[str, Any]] = {
    "train quickstart": ("train", RUN_RESULT),
    "prepare quickstart": ("prepare", {"output": "data/stdlib", "documents": 1800, "tokens": 7_654_321}),
    "eval m": ("evaluate", EVALUATION),
    "smoke": ("smoke", SMOKE),
    "doctor": ("doctor", DOCTOR),
    "plan quickstart": ("plan", PLAN),
    "convert in out": ("convert", CONVERTED),
    "publish m": ("publish", PUBLISHED),
    "lineage m": ("lineage", LINEAGE),
    "launch k8s status one": ("launch_k8s.status", ON_A_CLUSTER),
    "launch ssh status --host one --dir ~/x": ("launch_ssh.status", [MACHINE, {**MACHINE, "host": "gpu2"}]),
}
"""By command line: the verb that is replaced, which needs torch or another machine, and its result."""
ON_OTHER_MACHINES: dict[str, tuple[str, Any]] = {
    "launch k8s quickstart run.device=cpu": ("launch_k8s.submit", {"run": "quickstart", "applied": APPLIED}),
    "launch k8s status": ("launch_k8s.list_cluster_runs", [{"run": name, "kind": "StatefulSet"} for name in IDS]),
    "launch k8s stop one": ("launch_k8s.stop", {"run": "one", "exit_codes": {one["name"]: 75 for one in PODS}}),
    "launch k8s delete one": ("launch_k8s.delete", {"run": "one", "deleted": APPLIED}),
}
"""Further commands, whose texts are not kept."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs, rows with faults, and a config with faults."""
    folder = tmp_path_factory.mktemp("widths")
    for number, run_id in enumerate(IDS):
        recorded_run(folder / "runs", run_id, lr=0.003 * (1 + number))
    rows = [{"prompt": "What is it?", "completion": "A cat. " * 30}, {"promt": "Why?", "completion": "So."}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.yaml").write_text(
        "data: {name: synthetic}\noptimizer: {lr: fast, nme: muon}\ntrainer: {max_step: 5}\n"
    )
    return folder


COMMANDS = (
    *RESULTS,
    *("list-configs", "version", "validate quickstart", "validate bad.yaml", "runs", "report", "inspect rows.jsonl"),
    *(f"runs {IDS[0]}", f"runs {IDS[0]} {IDS[1]}", "runs nobody", "runs --sort sped", "runs rm"),
    *("generate --prompt x --interactive", "tran", "train --lora-r 8"),
    *(f"{verb} --help" for verbs in VERBS.values() for verb in verbs),
    *(f"launch {where} {verb} --help" for where in ("k8s", "ssh") for verb in ("status", "stop", "logs")),
    *ON_OTHER_MACHINES,
)


def printed(
    command: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    *,
    width: int | None,
) -> str:
    verb, result = {**RESULTS, **ON_OTHER_MACHINES}.get(command, ("", None))
    if "." in verb:
        monkeypatch.setattr(f"llmtrain.verbs.{verb}", lambda *_, **__: result)
    elif verb:
        module = ModuleType(f"llmtrain.verbs.{verb}")
        setattr(module, verb, lambda *_, **__: result)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", str(width or 1000))
    code = run(command.split())
    out, err = capsys.readouterr()
    return out + err if code else out  # the log of a run that goes well has a line for each record in a pipe


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("command", COMMANDS)
def test_lines_fit_the_width_and_no_word_is_broken(
    command: str, width: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = printed(command, folder, monkeypatch, capsys, width=None)
    narrow = printed(command, folder, monkeypatch, capsys, width=width)
    too_long = [line for line in narrow.splitlines() if columns_of(line) > width and len(line.split()) > 1]
    assert too_long == []
    words = set(narrow.split())
    if not command.endswith("--help"):  # whose bars and brackets are placed anew
        assert {word for word in words if "█" not in word} <= set(wide.split())
        if command != "runs":  # which leaves columns out
            assert {word for word in wide.split() if "█" not in word} <= words


EXPECTED = Path(__file__).parent / "widths"


@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("command", [*RESULTS, "list-configs", "validate bad.yaml", f"runs {IDS[0]} {IDS[1]}", "runs"])
def test_each_table_is_the_text_that_was_looked_at(
    command: str, width: int, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The texts are in widths/; LLMTRAIN_WRITE_WIDTHS=1 writes them anew, to be looked at."""
    monkeypatch.setattr("llmtrain.cli.runs._age", lambda run: 90_000.0)
    monkeypatch.setattr("llmtrain.runs.listing._size", lambda folder: 67_925)
    text = printed(command, folder, monkeypatch, capsys, width=width)
    words = command.split()
    name = "-".join(words[:3]) if words[0] == "launch" else f"{words[0]}{len(words)}"
    file = EXPECTED / f"{name}-{width}.txt"
    if os.environ.get("LLMTRAIN_WRITE_WIDTHS"):
        EXPECTED.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    assert text == file.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 60])
@pytest.mark.parametrize("reader", ["", " | cat"], ids=["terminal", "pipe"])
def test_a_real_terminal_shows_the_same(width: int, reader: str, folder: Path, tmp_path: Path) -> None:
    program = f"{sys.executable} -m llmtrain"
    script = (
        f"cd {folder} && {{ {program} list-configs; {program} validate bad.yaml; {program} runs {IDS[0]} {IDS[1]}; }}"
    )
    shown, done = tmp_path / "shown", tmp_path / "done"
    socket = str(tmp_path / "socket")
    started = ["tmux", "-S", socket, "-f", "/dev/null", "new-session", "-d", "-x", str(width), "-y", "300"]
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"} | {"NO_COLOR": "1"}
    command = f"{{ {script} 2>&1; }}{reader}; touch {done}; sleep 60"
    subprocess.run([*started, "sh", "-c", command], check=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not done.exists():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        shown.write_bytes(
            subprocess.run(["tmux", "-S", socket, "capture-pane", "-p"], check=True, capture_output=True).stdout
        )
    finally:
        subprocess.run(["tmux", "-S", socket, "kill-server"], check=False)
    piped = subprocess.run(
        ["sh", "-c", f"{script} 2>&1"],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "COLUMNS": str(width)},
    ).stdout
    assert shown.read_text(encoding="utf-8").split() == piped.split()
    lines = [line.rstrip() for line in shown.read_text(encoding="utf-8").rstrip().splitlines()]
    assert lines == [line.rstrip() for line in piped.splitlines()]
