"""Where a run is: what a checkpoint's state.json holds, and the random numbers of a step.

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

from llmtrain.tracking.metrics import VAL_LOSS
from llmtrain.training.cadence import Due

GOOD_STEPS_TO_GROW = 2000


@dataclass
class LossScale:
    """The factor on the loss that keeps float16 gradients from vanishing, as large as they allow (arXiv:1710.03740).

    Halved when a gradient overflows, doubled after 2000 steps in which none did.
    """

    value: float = 2.0**16
    good_steps: int = 0

    def overflowed(self) -> None:
        """Halve it, to 1 at least."""
        self.value, self.good_steps = max(1.0, self.value / 2), 0

    def went_well(self) -> None:
        """Count a step; double it when there were enough."""
        self.good_steps += 1
        if self.good_steps == GOOD_STEPS_TO_GROW:
            self.value, self.good_steps = self.value * 2, 0


@dataclass
class RunState:
    """The loop's position and what it has measured so far."""

    step: int = 0
    """Optimizer steps done."""
    item: int = 0
    """The first item that no step has used: the data position, whatever the batch size or the number of ranks."""
    tokens: int = 0
    """Tokens seen, supervised or not, without padding."""
    evaluated_step: int | None = None
    """Step of the last evaluation, so that one that was interrupted is made up for, and none is made twice."""
    asked_step: int | None = None
    """Step at which it was asked last, likewise."""
    best_step: int | None = None
    best: float | None = None
    """The figure that trainer.keep_best names, at that step."""
    best_val_loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    """The last figures of evaluations by their names."""
    gained: float | None = None
    """The figure that early stopping compares with."""
    evaluations_without_gain: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    skipped_steps: int = 0
    """Steps without an update, because a loss or a gradient was no finite number."""
    skipped_in_a_row: int = 0
    left_out: list[tuple[int, int]] = field(default_factory=list)
    """First item and the one after the last of each step that the run leaves out since it was taken back."""
    loss_scale: LossScale | None = None
    """With 16-mixed."""

    def as_dict(self) -> dict[str, Any]:
        """For state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """From state.json; fields that it does not know are left out, so that a newer checkpoint can be read."""
        # Older ones knew the validation loss alone.
        values = {"best": values.get("best_val_loss"), "gained": values.get("gained_val_loss"), **values}
        known = {field.name for field in dataclasses.fields(cls)}
        state = cls(**{name: value for name, value in values.items() if name in known})
        state.left_out = [(start, stop) for start, stop in state.left_out]
        if values.get("loss_scale") is not None:
            state.loss_scale = LossScale(**values["loss_scale"])
        return state

    def advance(self, items: range, *, num_tokens: int) -> None:
        """A step is done that used `items`."""
        self.step, self.item, self.tokens = self.step + 1, items.stop, self.tokens + num_tokens

    def leaves_out(self, items: range) -> bool:
        """Whether a roll-back left out any of these items."""
        return any(start < items.stop and items.start < stop for start, stop in self.left_out)

    def record_evaluation(
        self,
        figures: Mapping[str, float],
        due: Due,
        *,
        keep_best: str | None = VAL_LOSS,
        stop_by: str = VAL_LOSS,
        min_delta: float = 0.0,
    ) -> bool:
        """Note an evaluation at this step; whether it is the best so far, by the figure that `keep_best` names.

        One whose figure `stop_by` is not better by more than `min_delta` is one more without a gain. A figure that is
        no number is never better.
        """
        if due.validation:
            self.evaluated_step = self.step
        if due.questions:
            self.asked_step = self.step
        self.validation |= figures
        loss = figures.get(VAL_LOSS, math.nan)
        if _is_better(VAL_LOSS, loss, self.best_val_loss):
            self.best_val_loss = loss
        if stop_by in figures:
            if _is_better(stop_by, figures[stop_by], self.gained, by=min_delta):
                self.gained, self.evaluations_without_gain = figures[stop_by], 0
            else:
                self.evaluations_without_gain += 1
        if keep_best is None or not _is_better(keep_best, figures.get(keep_best, math.nan), self.best):
            return False
        self.best, self.best_step = figures[keep_best], self.step
        return True


def _is_better(name: str, value: float, than: float | None, *, by: float = 0.0) -> bool:
    """Less is better of what is measured on validation data, more of what is measured of answers."""
    if not math.isfinite(value) or than is None:
        return math.isfinite(value)
    return value < than - by if name.startswith("val/") else value > than + by


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators for one step; step -1 is the building of the model."""
    words = np.random.SeedSequence([seed, step + 1, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
