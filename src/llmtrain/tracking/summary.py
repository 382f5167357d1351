"""summary.json: how a run ended, in one small file; and writing such a file so that it is whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtrain.files import replace
from llmtrain.tracking.sinks import json_figures

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model's parameters; tied ones count once."""

    total: int
    trainable: int

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCount:
        """Those of `model`."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return cls(total=sum(n for n, _ in sizes), trainable=sum(n for n, trains in sizes if trains))


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What a run came to. Losses are in nats per token; None where there was none."""

    state: Literal["finished", "preempted", "failed"]
    steps: int
    """Optimizer steps since the run's beginning, those before a resume included."""
    resumed_from_step: int | None
    world_size: int
    tokens: int
    """Trained on since the run's beginning."""
    seconds: float
    """Wall time of this process; what came before a resume is not in it."""
    tokens_per_sec: float | None
    """Over all ranks, without compiling, evaluating and saving."""
    first_loss: float | None
    last_loss: float | None
    best_val_loss: float | None
    val_loss: float | None
    skipped_steps: int
    """Without an update, for a loss or a gradient that was no finite number."""
    parameters: ParameterCount
    peak_memory_bytes: int
    goodput: float
    """Share of `seconds` that went into training steps."""
    time_spent: dict[str, float] = field(default_factory=dict)
    """`seconds` by activity."""

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as JSON can hold them: a loss that is not finite is null and listed under `non_finite`."""
        values = asdict(self)
        floats = {name: value for name, value in values.items() if isinstance(value, float)}
        return values | json_figures(floats)

    def write(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        write_json(path, self.as_dict())


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Replace `path` by `document` in one move, after it is on disk. Raises ValueError at NaN or infinity."""
    text = json.dumps(document, indent=2, allow_nan=False) + "\n"
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    replace(part, path)
