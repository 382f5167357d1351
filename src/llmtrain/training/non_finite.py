"""A loss or a gradient that is infinite or no number: its name, and what is done about it.

    16-mixed, finite loss, gradients too large for float16   overflow     a smaller loss scale, no update; no event
    everything else                                          non_finite   stop | skip | rollback, as the config says

Decided from numbers that all ranks have, so alike on each. Taking a run back to its checkpoint is the verb's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from llmtrain.errors import WillFailAgain
from llmtrain.training.state import RunState

log = logging.getLogger("llmtrain.train")

MAX_IN_A_ROW = 10
"""Steps skipped or left out one after another, or roll-backs to one checkpoint: at so many it is not the data."""

Policy = Literal["stop", "skip", "rollback"]


class StepNumbers(NamedTuple):
    """Loss, gradient norm and counts of a step; the same on every rank."""

    step: int
    """Counted from 1."""
    loss: float
    grad_norm: float
    items: range

    def __str__(self) -> str:
        return (
            f"step {self.step}: the loss is {self.loss:g} and the gradient norm {self.grad_norm:g} "
            f"(sequences {self.items.start} to {self.items.stop - 1})"
        )


class NonFinite(WillFailAgain):
    """The run stops at a step."""

    def __init__(self, found: StepNumbers, advice: str) -> None:
        super().__init__(f"{found}{advice}")
        self.found = found


class RollBack(Exception):
    """Asks for the last checkpoint. Raised on every rank alike; the step that it tells of changed nothing."""

    def __init__(self, found: StepNumbers) -> None:
        super().__init__(str(found))
        self.found = found


def judge(found: StepNumbers, state: RunState, *, policy: Policy) -> None:
    """Note in the state whether the step's numbers are finite, and what is done if not: its update was left out.

    Raises WillFailAgain (exit 42) or RollBack where the policy wants it.
    """
    scale = state.loss_scale
    if math.isfinite(found.loss) and math.isfinite(found.grad_norm):
        state.skipped_in_a_row = 0
        if scale is not None:
            scale.went_well()
        return
    if scale is not None and scale.value > 1.0 and math.isfinite(found.loss):
        scale.overflowed()
        log.info("step %d: a gradient overflowed; the loss scale is %g now", found.step, scale.value)
        return
    if policy == "rollback":
        raise RollBack(found)
    if policy == "stop":
        raise NonFinite(
            found,
            ". The weights were not updated, and the last checkpoint is good. Lower optimizer.lr, lengthen "
            "scheduler.warmup_steps, or look at those sequences; trainer.non_finite=skip or rollback leaves them out",
        )
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row == MAX_IN_A_ROW:
        raise NonFinite(
            found,
            f", as in the {MAX_IN_A_ROW - 1} steps before it, which were skipped. It is not the data: lower "
            "optimizer.lr or lengthen scheduler.warmup_steps, and start again from an earlier checkpoint",
        )
    log.warning("%s. The update is skipped", found)


def leave_out(state: RunState, found: StepNumbers) -> None:
    """Note, in the state that the run was taken back to, the items that it is to leave out.

    Raises WillFailAgain if that did not help many times already.
    """
    state.left_out.append((found.items.start, found.items.stop))
    since_checkpoint = sum(start >= state.item for start, _ in state.left_out)
    if max(since_checkpoint, _longest_chain(state.left_out)) >= MAX_IN_A_ROW:
        raise WillFailAgain(
            f"{found}, after {len(state.left_out) - 1} roll-backs. It is not the data: lower optimizer.lr or lengthen "
            "scheduler.warmup_steps, and start again from an earlier checkpoint"
        )


def _longest_chain(ranges: Sequence[tuple[int, int]]) -> int:
    """Return the largest number of ranges of which each begins where the one before ends."""
    longest, chains = 0, dict[int, int]()  # end → ranges in the chain that ends there
    for start, end in sorted(ranges):
        chains[end] = chains.get(start, 0) + 1
        longest = max(longest, chains[end])
    return longest
