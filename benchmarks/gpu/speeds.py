"""Training from nothing: tokens/s, MFU, memory and idle time of decoders of 124M, 350M and 1.3B parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.gpu.setting import Setting
from benchmarks.gpu.small_runs import Config, write_config
from benchmarks.gpu.steps import StepClock
from llmtrain.config.loading.load import load_config
from llmtrain.tracking.sinks import read_metrics
from llmtrain.verbs.train import train

VOCAB_SIZE = 50_304
SHAPES: dict[str, dict[str, int]] = {
    "124M": {"d_model": 768, "num_layers": 12, "num_heads": 12, "d_ff": 2048},
    "350M": {"d_model": 1024, "num_layers": 24, "num_heads": 16, "d_ff": 2736},
    "1.3B": {"d_model": 2048, "num_layers": 24, "num_heads": 16, "d_ff": 5504},
}
"""Llamas with tied embeddings."""
SMOKE_SHAPE = {"d_model": 32, "num_layers": 1, "num_heads": 2, "d_ff": 64}
SMOKE_VOCAB_SIZE = 128
SMOKE_BATCH = (2, 16)


class Case(NamedTuple):
    """A training that is measured."""

    model: str
    batch: int
    length: int
    documents: bool = False
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        """Its name in the table."""
        extras = [*(["documents"] if self.documents else []), *([self.optimizer] if self.optimizer != "adamw" else [])]
        return ", ".join([f"{self.model} {self.batch}×{self.length}", *extras])


CASES = (
    Case("124M", 32, 1024),
    Case("124M", 32, 1024, documents=True),
    Case("1.3B", 8, 2048),
    Case("350M", 16, 1024),
    Case("124M", 32, 1024, optimizer="muon"),
    Case("124M", 8, 1024),
    Case("124M", 4, 8192),
    Case("124M", 4, 8192, documents=True),
)


def measure(setting: Setting) -> None:
    """Measure each case in turn."""
    for case in cases(setting):
        with setting.recorder.trying(case=case.name):
            clock = StepClock(setting, warm_up=setting.sized(6, smoke=1), steps=setting.sized(12, smoke=2))
            config = config_of(setting, case)
            setting.recorder.row(case=case.name, **timed_run(setting, f"speed-{CASES.index(case)}", config, clock))


def cases(setting: Setting) -> Iterator[Case]:
    """Yield the cases; on a CPU the same names with a tiny model behind them."""
    yield from setting.sized(CASES, smoke=(CASES[0], CASES[1], CASES[4]))


def shape_of(setting: Setting, case: Case) -> tuple[dict[str, int], int, int, int]:
    """Return a case's model, vocabulary, batch size and length."""
    if setting.smoke:
        return SMOKE_SHAPE, SMOKE_VOCAB_SIZE, *SMOKE_BATCH
    return SHAPES[case.model], VOCAB_SIZE, case.batch, case.length


def config_of(setting: Setting, case: Case) -> Config:
    """Return the config of a case."""
    shape, vocab_size, batch, length = shape_of(setting, case)
    return {
        "run": {"device": setting.device.type},
        "model": {
            "max_seq_len": length,
            "d_model": shape["d_model"],
            "num_layers": shape["num_layers"],
            "attention": {"num_heads": shape["num_heads"]},
            "ffn": {"d_ff": shape["d_ff"]},
        },
        "data": {
            "name": "benchmarks.gpu.motifs:Motifs",
            "seq_len": length,
            "options": {"vocab_size": vocab_size, "documents": case.documents},
        },
        "optimizer": {"name": case.optimizer},
        "trainer": {"micro_batch_size": batch},
    }


def timed_run(setting: Setting, name: str, config: Config, clock: StepClock) -> dict[str, Any]:
    """Train `config` for the steps of `clock` and no longer; return what was measured."""
    trainer = {
        "max_steps": clock.num_steps + 1,
        "compile": not setting.smoke,
        "log_every_steps": setting.sized(10, smoke=2),
        "eval_every_steps": None,
        "save_every_steps": None,
        **config["trainer"],
    }
    quiet = {"tracking": {"tensorboard": {"enabled": False}}, "logging": {"level": "ERROR"}}
    loaded = load_config(str(write_config(setting.work, name, {**config, "trainer": trainer, **quiet})), say=False)
    with clock:
        train(loaded)
    tokens = config["trainer"]["micro_batch_size"] * config["data"]["seq_len"]
    found = clock.result(tokens_per_step=tokens)
    return {"mfu": _mfu(setting, name, found["tokens_per_sec"]), **found}


def _mfu(setting: Setting, name: str, tokens_per_sec: float) -> float | None:
    """Return the share of the peak at this speed, by the FLOPs a token that the run itself counts; None on a CPU."""
    for line in read_metrics(setting.work / "runs" / name / "metrics.jsonl"):
        if line.get("train/mfu") and line.get("train/tokens_per_sec"):
            return float(line["train/mfu"]) / float(line["train/tokens_per_sec"]) * tokens_per_sec
    return None
