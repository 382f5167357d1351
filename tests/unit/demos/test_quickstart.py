"""`make demo` takes a model that this machine can train in the time that is left."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config.loading.load import LoadedConfig, load_config
from llmtrain.demos import quickstart
from llmtrain.demos.quickstart import (
    MIN_TRAINING_MINUTES,
    MINUTES,
    SIZES,
    TOKENS_PER_STEP,
    VOCABULARY,
    Candidate,
    Size,
    TooSlowError,
    choose,
    fit,
)
from llmtrain.models.decoder.decoder import Decoder

GFLOPS = {"A": 410e9, "B": 280e9, "C": 75e9}
"""What products reach on 2 cores of three kinds of processor: AVX512-BF16, AVX-512, AVX2."""


def on_cpu(monkeypatch: pytest.MonkeyPatch, flops: float) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(quickstart, "products_per_second", lambda precision: flops)


@pytest.mark.parametrize("spent_sec", [20, 120])
@pytest.mark.parametrize("kind", GFLOPS)
def test_training_and_what_follows_fit_into_the_time(
    kind: str, spent_sec: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    on_cpu(monkeypatch, GFLOPS[kind])
    config = load_config("quickstart", choose(spent_sec).overrides).config
    assert config.trainer.max_minutes is not None
    assert config.trainer.max_steps is None
    assert spent_sec / 60 + config.trainer.max_minutes < MINUTES
    line = capsys.readouterr().out
    assert f"{GFLOPS[kind] / 1e9:.0f} GFLOP/s" in line
    assert re.search(r"training \d\.\dM parameters for \d\.\d minutes", line)


def test_a_faster_machine_trains_no_smaller_model() -> None:
    chosen = [SIZES.index(fit(flops * 1e9, seconds=400)[0]) for flops in (1, 50, 100, 200, 400, 1000)]
    assert chosen == sorted(chosen)
    assert {chosen[0], chosen[-1]} == {0, len(SIZES) - 1}


def test_a_slow_download_does_not_take_the_time_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu(monkeypatch, 100e9)
    minutes = load_config("quickstart", choose(3600).overrides).config.trainer.max_minutes
    assert minutes is not None
    assert MIN_TRAINING_MINUTES / 2 < minutes < MIN_TRAINING_MINUTES


def test_a_gpu_takes_the_largest_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert set(SIZES[-1].overrides) <= set(choose(60).overrides)


def test_steps_that_are_slower_than_products_promised_take_a_smaller_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """459 steps of the largest model, as a busy machine once counted, ended worse than gzip."""
    on_cpu(monkeypatch, GFLOPS["A"])
    step_sec = {SIZES[-1]: 0.5, SIZES[1]: 0.3, SIZES[0]: 0.1}
    sizes = dict(zip((5e-3, 4e-3, 3e-3), SIZES, strict=True))
    trained: list[Size] = []

    def train(loaded: LoadedConfig, check_speed: Callable[[int, float], None]) -> dict[str, Any]:
        size = sizes[loaded.config.optimizer.lr]
        trained.append(size)
        check_speed(459, step_sec[size])
        return {"run": size.parameters}

    monkeypatch.setattr(quickstart, "train", train)
    loaded, summary = quickstart.train_what_fits(time.time() - 60)
    assert trained == [SIZES[-1], SIZES[0]], "27 TFLOP in a few minutes are too few for the one between too"
    assert summary == {"run": SIZES[0].parameters}
    assert loaded.config.optimizer.lr == 5e-3
    assert "is the machine busy? only 27.0 TFLOP fit, too few for 4.3M parameters" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.parameters)
def test_no_size_is_given_up_for_a_larger_one_or_for_none(size: Size) -> None:
    enough = math.ceil(size.from_flops / (TOKENS_PER_STEP * size.flops_per_token))
    Candidate(size, 5).check_speed(enough, 1.0)
    if size is SIZES[0]:
        Candidate(size, 5).check_speed(1, 100.0)
        return
    with pytest.raises(TooSlowError) as slow:
        Candidate(size, 5).check_speed(enough // 2, 1.0)
    assert SIZES.index(choose(60, slow=slow.value).size) < SIZES.index(size)


def test_the_batch_of_the_config_is_the_one_that_is_counted() -> None:
    config = load_config("quickstart", Candidate(SIZES[0], 5).overrides).config
    assert config.trainer.micro_batch_size * config.data.seq_len == TOKENS_PER_STEP


@pytest.mark.parametrize("size", SIZES, ids=lambda size: size.parameters)
def test_a_size_is_what_it_says(size: Size) -> None:
    config = load_config("quickstart", [*VOCABULARY, *size.overrides]).config
    assert config.prepare is not None
    assert config.prepare.tokenizer is not None
    with torch.device("meta"):
        decoder = Decoder(config.model, config.prepare.tokenizer.vocab_size or 0)  # type: ignore[arg-type]
    assert f"{sum(parameter.numel() for parameter in decoder.parameters()) / 1e6:.1f}M" == size.parameters
    assert decoder.flops_per_token(config.data.seq_len) == pytest.approx(size.flops_per_token, rel=0.05)


@pytest.mark.slow
def test_it_trains_compares_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "source").mkdir()
    for number in range(60):
        text = f'"""Module {number}."""\n\n\ndef get_{number}(self):\n    return self.table_{number}\n'
        (tmp_path / "source" / f"module_{number}.py").write_text(text)
    tiny = [
        *(f"prepare.input={tmp_path / 'source'}", "prepare.val_fraction=0.2", "prepare.tokenizer.vocab_size=300"),
        *("model.d_model=32", "model.num_layers=1", "model.attention.num_heads=2", "trainer.micro_batch_size=2"),
        *("trainer.compile=false", "run.device=cpu", "trainer.max_steps=null", "trainer.max_minutes=0.1"),
    ]
    monkeypatch.setattr(Candidate, "overrides", tiny)
    assert quickstart.main() in (0, 1)
    printed = capsys.readouterr().out
    for name in ("the model", "gzip -9", "xz -9"):
        assert re.search(rf"    {name} +\d\.\d{{3}} bits a byte", printed)
    again = re.search(r"llmtrain train (\S+/config\.yaml)", printed)
    assert again is not None
    assert load_config(again[1]).config.trainer.max_minutes is None
