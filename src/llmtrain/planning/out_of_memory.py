"""The message of a run that is out of memory: what took the memory, and the cheapest change of the config that fits.

    error ─▶ what is held (measured) ─▶ free it ─▶ predict the step ─▶ try changes, cheapest first ─▶ one message

A prediction that is below what was held and requested is scaled up to it. The changes, cheapest first: smaller
micro-batches (the batch stays the same), activation checkpointing of half of the blocks, then of all (a third more
computing), bfloat16, sharded parameters, one replica of them, shorter sequences.
"""

from __future__ import annotations

import gc
import logging
import traceback
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llmtrain.config.sections.schema import Config
from llmtrain.distributed.native_bf16 import computes_bf16
from llmtrain.errors import RunError, WillFailAgain
from llmtrain.planning.failed_allocation import HeldMemory, measure_held_memory
from llmtrain.planning.memory_choices import MARGIN, Parts, PlannableRun, blocks_of_mode, parts_of_run
from llmtrain.training.failures import is_out_of_memory

log = logging.getLogger("llmtrain.train")

RECOMPUTATION: Final = "trainer.activation_checkpointing"
SHORTEST: Final = 128
"""Shortest sequences to suggest."""

Changes = dict[str, Any]
"""Values by dotted key."""


@contextmanager
def out_of_memory_explained(failed: PlannableRun, *, run: Path) -> Iterator[None]:
    """Replace an allocator's error within the block by the one that `out_of_memory` returns."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(failed, error, run=run) from error


def out_of_memory(failed: PlannableRun, error: BaseException, *, run: Path) -> RunError:
    """Return the error to raise instead of an allocator's `error`. It frees the gradients."""
    engine, optimizer, step = failed.learner.engine, failed.learner.optimizer, failed.state.step + 1
    held = measure_held_memory(error, model=failed.trained.module, optimizer=optimizer, device=engine.device)
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    optimizer.zero_grad()
    gc.collect()
    log.warning("out of memory in step %d; looking for a change that fits", step)
    try:
        now = predicted_parts(failed, {})
        factor = correction(held, now)
        found = cheapest(
            failed.config,
            lambda changes: needed(predicted_parts(failed, changes), corrected_by=factor),
            limit=usable_bytes(held),
            bounds=Bounds.of(failed),
        )
    except Exception as failure:  # the original error must still be reported
        log.debug("no prediction:", exc_info=True)
        now, found = None, None
        log.warning("the memory of this step cannot be predicted (%s: %s)", type(failure).__name__, failure)
    message = describe(held, now, found, device=str(engine.device), step=step)
    if found:
        words = _words(found.changes)
        can_go_on = (run / "checkpoints" / "latest").exists() and "data.seq_len" not in found.changes
        command = f"llmtrain train --resume {run} {words}" if can_go_on else f"train again with {words}"
        message += f"\n{'to go on' if can_go_on else 'to start over'}: {command}"
    return (WillFailAgain if held.would_fail_again else RunError)(message)


# -- what would fit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bounds:
    """Facts about the run, besides the config, that limit which changes are possible."""

    sequences: int
    """Number of sequences of one optimizer step on one rank, a multiple of the micro-batch size."""
    world_size: int
    strategy: str
    can_use_bf16: bool
    """True if the run computes in float32, and its device could use bfloat16."""
    recomputation: Sequence[str] = ("selective", "full")
    """Values of trainer.activation_checkpointing that recompute more blocks than the run does."""

    @classmethod
    def of(cls, failed: PlannableRun) -> Bounds:
        """Return the bounds of a run."""
        engine, model = failed.learner.engine, failed.trained.module
        counts = {mode: blocks_of_mode(mode, model) for mode in ("selective", "full")}
        recomputed = engine.resolved.recomputed_blocks or 0
        return cls(
            recomputation=[mode for mode, n in counts.items() if n > recomputed and n in model.checkpointable],
            sequences=-(-failed.schedule.batch_size // engine.data_parallel_size),
            world_size=engine.world_size,
            strategy=engine.resolved.strategy,
            can_use_bf16=engine.resolved.precision == "32" and computes_bf16(engine.device.type),
        )


@dataclass(frozen=True)
class Fit:
    """Changes that make a step fit, and the memory that it is predicted to need then."""

    changes: Changes
    num_bytes: int


def cheapest(config: Config, predict: Callable[[Changes], int], *, limit: float, bounds: Bounds) -> Fit | None:
    """Return the cheapest changes with which a step needs no more than `limit` bytes; None if there are none.

    `predict` returns the bytes at a step's peak with some changes.
    """
    for changes in _costlier_changes(config, bounds):
        sizes = [size for size in range(1, config.trainer.micro_batch_size + 1) if bounds.sequences % size == 0]
        if not changes:
            sizes = sizes[:-1]  # the present size does not fit
        choices = [_with_size(config, changes, size, bounds) for size in sizes]
        if fitting := _last_that_fits(choices, predict, limit=limit):
            return fitting
    return None


def _costlier_changes(config: Config, bounds: Bounds) -> list[Changes]:
    """Return the changes to try besides smaller micro-batches: first none, then one more each time."""
    steps: list[tuple[str, Any]] = []
    steps += [(RECOMPUTATION, mode) for mode in bounds.recomputation]
    if bounds.can_use_bf16:
        steps.append(("trainer.precision", "bf16-mixed"))
    if bounds.world_size > 1 and bounds.strategy == "ddp":
        steps.append(("distributed.strategy", "fsdp"))
    if config.distributed.replicate > 1:
        steps.append(("distributed.replicate", 1))
    seq_len = config.data.seq_len // 2
    while seq_len >= SHORTEST:
        steps.append(("data.seq_len", seq_len))
        seq_len //= 2
    return [dict(steps[:count]) for count in range(len(steps) + 1)]


def _with_size(config: Config, changes: Changes, size: int, bounds: Bounds) -> Changes:
    """Return `changes` with micro-batches of `size`, and as many sequences a step as before."""
    if size == config.trainer.micro_batch_size:
        return changes
    smaller = {"trainer.micro_batch_size": size}
    if config.trainer.global_batch_size is None or config.trainer.grad_accum_steps is not None:
        smaller["trainer.grad_accum_steps"] = bounds.sequences // size
    return {**smaller, **changes}


def _last_that_fits(choices: Sequence[Changes], predict: Callable[[Changes], int], *, limit: float) -> Fit | None:
    """Return the last of `choices` that fits. Each needs more memory than the one before.

    It bisects, since each prediction runs a step.
    """
    fits: dict[int, Fit] = {}

    def size_of(index: int) -> int:
        fits[index] = Fit(choices[index], predict(choices[index]))
        return fits[index].num_bytes

    if not choices or size_of(0) > limit:  # if the first does not fit, none does
        return None
    return fits[bisect_right(range(len(choices)), limit, lo=1, key=size_of) - 1]


def usable_bytes(held: HeldMemory) -> float:
    """Return the bytes that a step may be predicted to need: the memory that it can have, less a margin."""
    # The failed allocation shows that the memory is less than peak and request together.
    usable = min(held.available, held.peak + held.requested) if held.requested else held.available
    return MARGIN * usable


def correction(held: HeldMemory, now: Mapping[str, int]) -> float:
    """Return the factor for the temporary tensors of a prediction; 1 unless the prediction was too low.

    A step needs at least the bytes that were held and requested.
    """
    from llmtrain.planning.step_memory import TRANSIENT

    transient = sum(now[part] for part in TRANSIENT)
    return max(1.0, (held.peak + held.requested - (sum(now.values()) - transient)) / max(1, transient))


def needed(parts: Mapping[str, int], *, corrected_by: float) -> int:
    """Return the bytes of a step at its peak, with the temporary tensors scaled by `corrected_by`."""
    from llmtrain.planning.step_memory import TRANSIENT

    return round(sum(parts.values()) + (corrected_by - 1) * sum(parts[part] for part in TRANSIENT))


def predicted_parts(failed: PlannableRun, changes: Changes) -> Parts:
    """Return the predicted bytes of the step on this rank with some changes of the config, by part."""
    resolved = failed.learner.engine.resolved
    if RECOMPUTATION in changes:
        count = blocks_of_mode(changes[RECOMPUTATION], failed.trained.module)
        resolved = replace(resolved, recomputed_blocks=count)
    resolved = replace(
        resolved,
        precision=changes.get("trainer.precision", resolved.precision),
        strategy=changes.get("distributed.strategy", resolved.strategy),
    )
    return parts_of_run(failed, changed(failed.config, changes), resolved)


def changed(config: Config, changes: Changes) -> Config:
    """Return `config` with the values of `changes`."""
    for key, value in changes.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


# -- the message -------------------------------------------------------------------------------------------------------


def describe(held: HeldMemory, now: Mapping[str, int] | None, found: Fit | None, *, device: str, step: int) -> str:
    """Return the message: the requested bytes, a table of held and predicted bytes by part, and what to change."""
    more = f"{_shown(held.requested)} more were requested" if held.requested else "more was requested than there is"
    lines = [
        f"out of memory on {device} in step {step}: {more}; at most {_shown(held.peak)} were held, and this process "
        f"can have {_shown(held.available)} of {_shown(held.total)}"
    ]
    lines += _table(held, now)
    if not held.would_fail_again:
        lines.append(
            f"other processes hold {_shown(held.total - held.available)}: without them the step may fit as it is"
        )
    if found:
        same = "" if "data.seq_len" in found.changes else ", the batch stays as it is"
        lines.append(
            f"the cheapest change that fits: {_words(found.changes)} ({_shown(found.num_bytes)} predicted{same})"
        )
    elif now:
        lines.append(
            "smaller micro-batches, activation_checkpointing, bfloat16 and shorter sequences are not enough: use a "
            "smaller model, model.lora, or more devices with distributed.strategy=fsdp"
        )
    return "\n".join(lines)


def _table(held: HeldMemory, now: Mapping[str, int] | None) -> list[str]:
    """Return a table of measured and predicted bytes. The measured temporary tensors are one row: they are gone now."""
    fixed = {"parameters": held.parameters, "gradients": held.gradients, "optimizer_state": held.optimizer_state}
    rows: list[tuple[str, int | None, int | None]]
    rows = [(part.replace("_", " "), size, now[part] if now else None) for part, size in fixed.items()]
    rows.append(("the rest", held.rest, sum(now.values()) - sum(now[part] for part in fixed) if now else None))
    rows += [(f"  {part}", None, now[part]) for part in ("activations", "logits") if now]
    rows.append(("total", held.peak, sum(now.values()) if now else None))
    head = f"  {'':<18}{'held':>12}{'' if now is None else 'predicted':>14}".rstrip()
    return [head, *(f"  {name:<18}{_shown(own):>12}{_shown(then):>14}".rstrip() for name, own, then in rows)]


def _words(changes: Changes) -> str:
    """Return the changes as overrides for the command line."""
    return " ".join(f"{key}={value}" for key, value in changes.items())


def _shown(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
