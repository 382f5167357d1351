"""`eval` computes every model in one precision on a GPU, unless its command asks for another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from llmtrain.config.loading.load import plain_config
from llmtrain.verbs import evaluate


@pytest.mark.parametrize(
    ("device", "trained_in", "asked_here", "computed_in"),
    [
        ("cuda", "32", False, "auto"),
        ("cuda:1", "16-mixed", False, "auto"),
        ("cuda", "bf16-true", False, "auto"),
        ("cuda", "32", True, "32"),
        ("cpu", "32", False, "32"),
        ("cpu", "bf16-mixed", False, "auto"),
        ("cpu", "bf16-mixed", True, "bf16-mixed"),
    ],
)
def test_the_precision_is_that_of_the_machine_or_of_the_command(
    device: str, trained_in: str, asked_here: bool, computed_in: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "resolve_device", lambda _: device)
    monkeypatch.setattr(evaluate, "computes_bf16", lambda _: False)
    monkeypatch.setattr(evaluate, "resolve", lambda run, trainer, distributed: trainer)
    monkeypatch.setattr(evaluate, "Engine", lambda resolved, **_: SimpleNamespace(resolved=resolved))
    about = plain_config([f"trainer.precision={trained_in}"])
    engine: Any = evaluate._engine(about, precision_asked_here=asked_here)
    assert engine.resolved.precision == computed_in
