"""summary.json: how a run ended, in one small file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmtrain.atomic import write_json
from llmtrain.tracking.sinks import json_metrics

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of a model's parameters; tied parameters count once."""

    total: int
    trainable: int

    @classmethod
    def of(cls, model: nn.Module) -> ParameterCount:
        """Count the parameters of `model`."""
        sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
        return cls(total=sum(n for n, _ in sizes), trainable=sum(n for n, trains in sizes if trains))


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """The result of a run. Losses are in nats per token; None where there was none."""

    state: Literal["finished", "preempted", "failed"]
    steps: int
    """Optimizer steps since the run's beginning, including those before a resume."""
    resumed_from_step: int | None
    world_size: int
    tokens: int
    """Tokens trained on since the run's beginning."""
    seconds: float
    """Wall time of training since the run's beginning, over all its attempts: up to the checkpoint from which each was
    resumed, as `tokens` and `steps` are. Loading and setting up do not count."""
    tokens_per_sec: float | None
    """Speed over all ranks and attempts, without the time of compiling, evaluating and saving."""
    first_loss: float | None
    last_loss: float | None
    best_val_loss: float | None
    val_loss: float | None
    skipped_steps: int
    """Steps without an update, since the loss or a gradient was not finite."""
    parameters: ParameterCount
    peak_memory_bytes: int
    goodput: float
    """Share of `seconds` that was spent in training steps."""
    time_spent: dict[str, float] = field(default_factory=dict)
    """`seconds` by activity."""
    mixture: list[dict[str, Any]] | None = None
    """Each source of a mixture with its share, the share that was asked for, and its epochs; None without a mixture."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: a loss that is not finite is null and listed under `non_finite`."""
        values = asdict(self)
        floats = {name: value for name, value in values.items() if isinstance(value, float)}
        return values | json_metrics(floats)

    def write(self, path: Path) -> None:
        """Write the summary to `path`, complete or not at all."""
        write_json(path, self.as_dict())
