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


@dataclass
class RunState:
    """The loop's position and what it has measured so far."""

    step: int = 0
    """Optimizer steps done."""
    item: int = 0
    """The first item that no step has used: the data position, whatever the batch size or the number of ranks."""
    tokens: int = 0
    """Supervised tokens seen."""
    evaluated_step: int | None = None
    """Step of the last evaluation, so that one that was interrupted is made up for, and none is made twice."""
    best_step: int | None = None
    best_val_loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    """The last evaluation's figures by their names."""
    first_loss: float | None = None
    last_loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For state.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunState:
        """From state.json; fields that it does not know are left out, so that a newer checkpoint can be read."""
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in known})

    def record_validation(self, figures: Mapping[str, float]) -> bool:
        """Note an evaluation at this step; whether it is the best so far. A loss that is no number never is."""
        self.evaluated_step = self.step
        self.validation = dict(figures)
        loss = figures[VAL_LOSS]
        better = math.isfinite(loss) and (self.best_val_loss is None or loss < self.best_val_loss)
        if better:
            self.best_val_loss, self.best_step = loss, self.step
        return better


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed Python's, numpy's and torch's generators for one step; step -1 is the building of the model."""
    words = np.random.SeedSequence([seed, step + 1, rank]).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(int(words[1]))
    torch.manual_seed(int(words[2]) << 32 | int(words[3]))
