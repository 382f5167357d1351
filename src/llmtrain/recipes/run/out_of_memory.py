"""A run that had too little memory: what took it, and the cheapest change that fits.

    error ─▶ what is held (measured) ─▶ free it ─▶ the step as predicted ─▶ changes, the cheapest first ─▶ one message

A prediction that the machine has proved too low is scaled up to what was held and asked for. The changes, in the order
of what they cost: smaller micro-batches (the batch stays), blocks computed again in the backward pass (a third more
computing), bfloat16, parameters cut over the ranks, shorter sequences.
"""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from llmtrain.config.chat import ChatConfig
from llmtrain.config.data import SyntheticConfig
from llmtrain.config.errors import RunError, WillFailAgain
from llmtrain.config.schema import Config
from llmtrain.distributed.engine import computes_bf16
from llmtrain.recipes.planning.memory import planned_memory
from llmtrain.recipes.planning.planned import PlannedData, planned_model
from llmtrain.recipes.run.job import Job
from llmtrain.training.memory import CUDA_CONTEXT_BYTES, TRANSIENT
from llmtrain.training.out_of_memory import Held, held_when

log = logging.getLogger("llmtrain.train")

MARGIN: Final = 0.95
"""Share of what there is that a change may be predicted to need: predictions are right within some percent."""
SHORTEST: Final = 128

Changes = dict[str, Any]
"""Values by dotted key."""
Parts = dict[str, int]
"""Bytes by what holds them."""


def out_of_memory(job: Job, error: BaseException, *, run: Path) -> RunError:
    """What to raise in place of `error`, which an allocator raised. The job cannot be used any more afterwards."""
    device = job.engine.device
    held = held_when(error, model=job.trained.module, optimizer=job.optimizer, device=device)
    traceback.clear_frames(error.__traceback__)  # they hold the activations
    job.optimizer.zero_grad()
    gc.collect()
    log.warning("out of memory in step %d; working out what would fit", job.state.step + 1)
    try:
        predict = _Prediction(job)
        now = predict({})
        factor = correction(held, now)
        found = cheapest(
            job.config,
            lambda changes: needed(predict(changes), corrected_by=factor),
            room=room(held),
            shape=Shape.of(job),
        )
    except Exception as failure:  # the run's own error must not be lost over it
        log.debug("no prediction:", exc_info=True)
        now, found = None, None
        log.warning("the memory of this step cannot be predicted (%s: %s)", type(failure).__name__, failure)
    message = describe(held, now, found, device=str(device), step=job.state.step + 1)
    if found:
        words = _words(found.changes)
        can_go_on = (run / "checkpoints" / "latest").exists() and "data.seq_len" not in found.changes
        command = f"llmtrain train --resume {run} {words}" if can_go_on else f"train again with {words}"
        message += f"\n{'to go on' if can_go_on else 'to start over'}: {command}"
    return (WillFailAgain if held.would_fail_again else RunError)(message)


# -- what would fit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the choice of a change hangs on, besides the config."""

    sequences: int
    """Of one optimizer step, on one rank."""
    world_size: int
    strategy: str
    can_halve: bool
    """Numbers of 16 bits in place of 32."""

    @classmethod
    def of(cls, job: Job) -> Shape:
        resolved, world_size = job.engine.resolved, job.engine.world_size
        return cls(
            sequences=job.schedule.batch_size // job.engine.dp_size,
            world_size=world_size,
            strategy=resolved.strategy,
            can_halve=resolved.precision == "32" and computes_bf16(job.engine.device.type),
        )


@dataclass(frozen=True)
class Fit:
    """Changes that make a step fit, and what it is predicted to need then."""

    changes: Changes
    num_bytes: int


def cheapest(config: Config, predict: Callable[[Changes], int], *, room: float, shape: Shape) -> Fit | None:
    """The first change, in the order of what they cost, that needs no more than `room` bytes; None: there is none.

    `predict` gives the bytes of a step's peak under some changes.
    """
    for changes in _costlier(config, shape):
        sizes = [size for size in range(1, config.trainer.micro_batch_size + 1) if shape.sequences % size == 0]
        if not changes:
            sizes = sizes[:-1]  # as it is now, it does not fit
        ways = [_with_size(config, changes, size, shape) for size in sizes]
        if fitting := _last_that_fits(ways, predict, room=room):
            return fitting
    return None


def _costlier(config: Config, shape: Shape) -> Iterator[Changes]:
    """What to do besides smaller micro-batches: nothing, then more and more."""
    changes: Changes = {}
    yield dict(changes)
    if not config.trainer.activation_checkpointing:
        changes["trainer.activation_checkpointing"] = True
        yield dict(changes)
    if shape.can_halve:
        changes["trainer.precision"] = "bf16-mixed"
        yield dict(changes)
    if shape.world_size > 1 and shape.strategy == "ddp":
        changes["distributed.strategy"] = "fsdp"
        yield dict(changes)
    seq_len = config.data.seq_len // 2
    while seq_len >= SHORTEST:
        changes["data.seq_len"] = seq_len
        yield dict(changes)
        seq_len //= 2


def _with_size(config: Config, changes: Changes, size: int, shape: Shape) -> Changes:
    """`changes`, and micro-batches of `size`; as many sequences a step as before."""
    if size == config.trainer.micro_batch_size:
        return changes
    smaller = {"trainer.micro_batch_size": size}
    if config.trainer.global_batch_size is None or config.trainer.grad_accum_steps is not None:
        smaller["trainer.grad_accum_steps"] = shape.sequences // size
    return {**smaller, **changes}


def _last_that_fits(ways: Sequence[Changes], predict: Callable[[Changes], int], *, room: float) -> Fit | None:
    """Of `ways`, each of which needs more than the one before; found by halving, since each try runs a step."""
    best: Fit | None = None
    low, high = 0, len(ways)
    middle = 0  # the first one first: where it does not fit, none does
    while low < high:
        num_bytes = predict(ways[middle])
        if num_bytes <= room:
            best, low = Fit(ways[middle], num_bytes), middle + 1
        else:
            high = middle
        middle = (low + high) // 2
    return best


def room(held: Held) -> float:
    """Bytes that a step may be predicted to need: what there is, less what is unsure. What was refused is not there."""
    there_is = min(held.available, held.peak + held.asked) if held.asked else held.available
    return MARGIN * there_is


def correction(held: Held, now: Mapping[str, int]) -> float:
    """What a prediction's tensors that come and go are to be multiplied by; 1 unless it has proved too low.

    A step needs at least what was held and asked for together.
    """
    transient = sum(now[part] for part in TRANSIENT)
    return max(1.0, (held.peak + held.asked - (sum(now.values()) - transient)) / max(1, transient))


def needed(parts: Mapping[str, int], *, corrected_by: float) -> int:
    """Bytes of a step at its peak."""
    return round(sum(parts.values()) + (corrected_by - 1) * sum(parts[part] for part in TRANSIENT))


class _Prediction:
    """A step's parts under some changes of the job's config, on this rank."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._on_gpu = job.engine.device.type == "cuda"
        self._vocab_size = job.trained.module.vocab_size

    def __call__(self, changes: Changes) -> Parts:
        job, config = self._job, changed(self._job.config, changes)
        data = config.data
        packed = not isinstance(data, ChatConfig) or data.packing
        apart = not isinstance(data, SyntheticConfig) and data.mask_documents and packed
        precision = changes.get("trainer.precision", job.engine.resolved.precision)
        known = PlannedData(
            items_per_epoch=None, tokens_per_item=data.seq_len, documents_apart=apart, vocab_size=self._vocab_size
        )
        model = planned_model(config, known, precision=precision, assumed=[])
        memory = planned_memory(
            config,
            replace(model, process_bytes=job.process_bytes),
            schedule=job.schedule,
            documents_apart=apart,
            precision=precision,
            compiled=job.engine.resolved.compile,
            on_gpu=self._on_gpu,
            world_size=job.engine.world_size,
            strategy=changes.get("distributed.strategy", job.engine.resolved.strategy),
        )
        return memory.parts | ({"CUDA": CUDA_CONTEXT_BYTES} if self._on_gpu else {})


def changed(config: Config, changes: Changes) -> Config:
    """`config` with other values at some keys."""
    for key, value in changes.items():
        section, name = key.split(".")
        config = config.model_copy(update={section: getattr(config, section).model_copy(update={name: value})})
    return config


# -- how it is told ----------------------------------------------------------------------------------------------------


def describe(held: Held, now: Mapping[str, int] | None, found: Fit | None, *, device: str, step: int) -> str:
    """Several lines: what was refused, what holds how much and was predicted to, and what to change."""
    more = f"{_shown(held.asked)} more were asked for" if held.asked else "more was asked for than there is"
    lines = [
        f"out of memory on {device} in step {step}: {more}; at most {_shown(held.peak)} were held, and this process "
        f"can have {_shown(held.available)} of {_shown(held.total)}"
    ]
    lines += _table(held, now)
    if not held.would_fail_again:
        lines.append(f"other processes hold {_shown(held.total - held.available)}: without them it may fit as it is")
    if found:
        same = "" if "data.seq_len" in found.changes else ", the batch stays as it is"
        lines.append(
            f"the cheapest change that fits: {_words(found.changes)} ({_shown(found.num_bytes)} predicted{same})"
        )
    elif now:
        lines.append(
            "smaller micro-batches, activation_checkpointing, bfloat16 and shorter sequences are not enough: take a "
            "smaller model, model.lora, or more devices with distributed.strategy=fsdp"
        )
    return "\n".join(lines)


def _table(held: Held, now: Mapping[str, int] | None) -> list[str]:
    """Measured and predicted beside each other. What came and went cannot be told apart once it is too late."""
    fixed = {"parameters": held.parameters, "gradients": held.gradients, "optimizer_state": held.optimizer_state}
    rows: list[tuple[str, int | None, int | None]]
    rows = [(part.replace("_", " "), size, now[part] if now else None) for part, size in fixed.items()]
    if now is None:
        rows += [("all else", held.rest, None), ("together", held.peak, None)]
    else:
        together = sum(now.values())
        rows.append(("all else", held.rest, together - sum(now[part] for part in fixed)))
        rows += [(f"  {part}", None, now[part]) for part in ("activations", "logits")]
        rows.append(("together", held.peak, together))
    head = f"  {'':<18}{'held':>12}{'' if now is None else 'predicted':>14}".rstrip()
    return [head, *(f"  {name:<18}{_shown(own):>12}{_shown(then):>14}".rstrip() for name, own, then in rows)]


def _words(changes: Changes) -> str:
    """As overrides of the command line."""
    return " ".join(f"{key}={str(value).lower() if value is True else value}" for key, value in changes.items())


def _shown(size: float | None) -> str:
    if size is None:
        return ""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
