"""State of a run: its position and metrics, which a checkpoint's state.json holds; the random numbers of a step.

Randomness has no state of its own: every step reseeds all generators from (seed, step, rank), so a step draws the same
numbers whether or not the run was stopped before it. See docs/decisions/0003-random-numbers-from-the-step.md.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmtrain.tracking.metric_names import VAL_LOSS
from llmtrain.tracking.times import Spent
from llmtrain.training.cadence import Due

GOOD_STEPS_TO_GROW = 2000


@dataclass
class LossScale:
    """Factor on the loss that keeps float16 gradients from vanishing, as large as they allow (arXiv:1710.03740).

    It is halved when a gradient overflows, and doubled after 2000 steps in which none did.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def overflowed(self) -> None:
        """Halve the factor, to 1 at least."""
        self.value, self.good_steps = max(1.0, self.value / 2), 0

    def went_well(self) -> None:
        """Count a step without overflow; double the factor when there were enough."""
        self.good_steps += 1
        if self.good_steps == GOOD_STEPS_TO_GROW:
            self.value, self.good_steps = self.value * 2, 0


@dataclass
class RunState:
    """Position of the training loop, and what it has measured so far."""

    step: int = 0
    """Optimizer steps done."""
    item: int = 0
    """The first item that no step has used: the data position, whatever the batch size or the number of ranks."""
    tokens: int = 0
    """Tokens used, supervised or not, without padding."""
    evaluated_step: int | None = None
    """Step of the last evaluation, so that an interrupted one is repeated after a resume, and none is made twice."""
    asked_step: int | None = None
    """Step at which the model was last asked questions, for the same reason."""
    best_step: int | None = None
    best: float | None = None
    """Value of the metric that trainer.keep_best names, at that step."""
    best_val_loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    """Metric → value in the last evaluation that measured it."""
    gained: float | None = None
    """Value that early stopping compares with."""
    evaluations_without_gain: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    skipped_steps: int = 0
    """Steps without an update, because a loss or a gradient was not finite."""
    skipped_in_a_row: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """First item, and the one after the last, of each step that the run leaves out after a rollback."""
    warmup_steps: int | None = None
    """Steps of warm-up that the run began with, whatever its length becomes."""
    warmup_asked: list[Any] | None = None
    """Keys of the config that these follow: with others, warm-up is worked out anew."""
    loss_scale: LossScale | None = None
    """Only with 16-mixed."""
    epoch_loss_sum: float = 0.0
    """Loss over the tokens of the epoch that this state is in."""
    epoch_tokens: int = 0
    spent: Spent = field(default_factory=Spent)
    """Time up to the checkpoint that holds this state."""

    def as_dict(self) -> dict[str, Any]:
        """Return the content of state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """Read the content of state.json. Unknown fields are ignored, so that a newer checkpoint can be read."""
        # Older checkpoints hold only the validation loss.
        values = {"best": values.get("best_val_loss"), "gained": values.get("gained_val_loss"), **values}
        known = {field.name for field in dataclasses.fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        state.left_out = [(start, stop) for start, stop in state.left_out]
        if values.get("loss_scale") is not None:
            state.loss_scale = LossScale(**values["loss_scale"])
        state.spent = Spent(**values.get("spent", {}))
        return state

    def advance(self, items: range, *, num_tokens: int) -> None:
        """Move on by a step that used `items`."""
        self.step, self.item, self.tokens = self.step + 1, items.stop, self.tokens + num_tokens

    def leaves_out(self, items: range) -> bool:
        """Tell whether a rollback left out any of these items."""
        return any(start < items.stop and items.start < stop for start, stop in self.left_out)

    def keep_best_of(self, later: RunState, *, metric: str | None) -> None:
        """Take the best of a course that the run was sent back from: its checkpoint still is the run's best."""
        if metric is not None and later.best is not None and _is_better(metric, later.best, self.best):
            self.best, self.best_step = later.best, None

    def take_back_best(self, value: float | None, step: int | None, *, metric: str | None) -> bool:
        """Go back to an earlier best, as the checkpoint of a later one is not there.

        Return whether the evaluation at this very step is better than that one, and so the best now.
        """
        self.best, self.best_step = value, step
        found = self.validation.get(metric or "", math.nan)
        if metric is None or self.step not in (self.evaluated_step, self.asked_step):
            return False
        if not _is_better(metric, found, self.best):
            return False
        self.best, self.best_step = found, self.step
        return True

    def record_evaluation(
        self,
        metrics: Mapping[str, float],
        due: Due,
        *,
        keep_best: str | None = VAL_LOSS,
        stop_by: str = VAL_LOSS,
        min_delta: float = 0.0,
    ) -> bool:
        """Record an evaluation at this step. Return whether it is the best so far, by the metric `keep_best`.

        It counts as one without a gain if its metric `stop_by` is not better by more than `min_delta`. A value that is
        not finite is never better.
        """
        if due.validation:
            self.evaluated_step = self.step
        if due.questions:
            self.asked_step = self.step
        self.validation |= metrics
        loss = metrics.get(VAL_LOSS, math.nan)
        if _is_better(VAL_LOSS, loss, self.best_val_loss):
            self.best_val_loss = loss
        if stop_by in metrics:
            if _is_better(stop_by, metrics[stop_by], self.gained, by=min_delta):
                self.gained, self.evaluations_without_gain = metrics[stop_by], 0
            else:
                self.evaluations_without_gain += 1
        if keep_best is None or not _is_better(keep_best, metrics.get(keep_best, math.nan), self.best):
            return False
        self.best, self.best_step = metrics[keep_best], self.step
        return True


def _is_better(name: str, value: float, than: float | None, *, by: float = 0.0) -> bool:
    """Compare two values of a metric: validation losses are better lower, metrics of answers better higher."""
    if not math.isfinite(value) or than is None:
        return math.isfinite(value)
    return value < than - by if name.startswith("val/") else value > than + by


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators for one step; step -1 is the building of the model."""
    words = np.random.SeedSequence([seed, step + 1, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
