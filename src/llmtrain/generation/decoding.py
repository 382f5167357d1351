"""Generates tokens from a model, one at a time, in batches, with a key/value cache.

    prompts ─ padded on the left ─ one forward pass for all ─▶ logits of the next tokens ─ choose_tokens ─┐
                                        ▲                                                                 │
                                        └───────── one forward pass with the chosen tokens ◀──────────────┤
                                                                                                          ▼
    waiting rows ─ one forward pass ─▶ the places of rows that have ended ◀─ every READ_EVERY tokens ─ the host

Tokens are chosen on the model's device. What a row wrote after its end, before the host has read that, is dropped.
Waiting rows join only if the cache can be refilled. A row's result depends on its prompt and the seed, not on what else
is in the batch. completion.py makes text of the tokens; sampling.py chooses them.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmtrain.distributed.sharding import without_gradients
from llmtrain.errors import ConfigError
from llmtrain.generation.sampling import Decoding, Sampling, choose_tokens, choosing_device, generators_for
from llmtrain.screen import counted


class DecodingCache(Protocol):
    """Method that generation needs of a model's key/value cache. Otherwise it only passes the cache to the model."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Remove all other rows."""
        ...


@runtime_checkable
class RefillableCache(DecodingCache, Protocol):
    """A cache in which rows that have ended can be replaced by others."""

    @property
    def is_full(self) -> bool:
        """True if the cache has no slot for the next token."""
        ...

    def empty_rows(self, rows: Sequence[int]) -> None:
        """Remove the tokens of these rows. The number of rows stays the same."""
        ...

    def replace_rows(self, rows: Sequence[int], other: Any) -> None:
        """Replace these rows by the rows of `other`, another cache, which have no more tokens."""
        ...

    def drop_padding(self) -> None:
        """Remove the slots that are padding in all rows."""
        ...


class CachedModel(Protocol):
    """Methods that generation needs of a model."""

    @property
    def max_seq_len(self) -> int | None:
        """Length of the longest sequence, in tokens; None: there is no limit."""
        ...

    @property
    def device(self) -> torch.device:
        """Device on which the model expects tokens."""
        ...

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> DecodingCache:
        """Return an empty cache for rows of `max_len` tokens, of which the first `first_slots[b]` are padding."""
        ...

    def logits(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: Any = None, *, last_only: bool = False
    ) -> Tensor:
        """Return logits [b, t, vocab] of the token after each of `input_ids`, which follow the cache's tokens.

        The keys and values of `input_ids` are added to the cache. With `last_only`, t is 1.
        """
        ...


@dataclass(frozen=True)
class Prompt:
    """Tokens that a row begins with."""

    ids: Sequence[int]
    first_tokens: Tensor | None = None
    """Ids from which the row's first new token is chosen; None: any."""
    draw_key: str | None = None
    """Key of the row's random numbers, besides the seed; None: the prompt, and how often it came before."""

    @property
    def key(self) -> Sequence[int] | str:
        """Key of the row's random numbers."""
        if self.draw_key is not None:
            return self.draw_key
        # Two prompts may differ only in the token that healing removed.
        return self.ids if self.first_tokens is None else [*self.ids, -1, *self.first_tokens.tolist()]


REFILL_DIVISOR = 4
"""A batch is refilled when 1/REFILL_DIVISOR of its rows have ended, since some prompts take little longer than one."""
READ_EVERY = 4
"""Number of tokens of each row after which the host reads those of a GPU. Waiting for each would leave the GPU idle."""

OnToken = Callable[[int, int], bool]
"""Called with (row, token) for each new token; returns whether to continue the row after it."""


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int] | Prompt],
    how: Decoding,
    *,
    stop_ids: Collection[int] = (),
    on_token: OnToken | None = None,
    on_end: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, without the prompt and the stop token, in the prompts' order.

    A row ends after `how.max_new_tokens`, at one of `stop_ids` (for which `on_token` is not called), when `on_token`
    returns False, or when the model's context is full. `on_end` is called with each row that has ended. Rows of similar
    lengths are computed together. A row's random numbers depend only on the seed and its `Prompt.key`. The model should
    be in evaluation mode.

    Raises ConfigError if a prompt is empty or leaves no room in the context.
    """
    rows = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    limit = context_length(model)
    _check_prompts([prompt.ids for prompt in rows], limit=limit)
    room = [min(how.max_new_tokens, limit - len(prompt.ids)) for prompt in rows]
    generated: list[list[int]] = [[] for _ in rows]

    def add(row: int, tokens: Sequence[int]) -> int | None:
        """Add the row's next tokens up to its end, and return the last one; None if the row ends."""
        for token in tokens:
            continues = False
            if token not in stop_ids:
                generated[row].append(token)
                continues = on_token is None or on_token(row, token)
            if not continues or len(generated[row]) == room[row]:
                on_end(row)
                return None
        return tokens[-1]

    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row].ids), reverse=True)
    batches = _Batches(model, rows, how.sampling, generated=generated, room=room, add=add)
    with without_gradients(model):
        batches.decode(deque(by_length), size=how.batch_size or max(1, len(rows)), most_tokens=max(room, default=0))
    return generated


class _Batches:
    """Decodes rows in batches. Rows that end are replaced by waiting rows if the model's cache can be refilled."""

    def __init__(
        self,
        model: CachedModel,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        *,
        generated: Sequence[Sequence[int]],
        room: Sequence[int],
        add: Callable[[int, Sequence[int]], int | None],
    ) -> None:
        """Set the model, the rows' prompts, the tokens that they have so far and how many these may become.

        `add(row, tokens)` adds to a row's tokens, and returns the last one; None ends the row.
        """
        self._model, self._prompts, self._sampling = model, prompts, sampling
        self._generated, self._room, self._add = generated, room, add
        self._choosing = choosing_device(model.device, sampling)
        self._generators = generators_for([prompt.key for prompt in prompts], seed=sampling.seed)

    def decode(self, waiting: deque[int], *, size: int, most_tokens: int) -> None:
        """Decode the waiting rows in their order (longest prompts first), `size` at a time, until all have ended."""
        while waiting:
            rows: list[int | None] = [waiting.popleft() for _ in range(min(size, len(waiting)))]
            cache, chosen = self._begin(rows, most_tokens=most_tokens)
            while any(token is not None for token in chosen):
                ended = [place for place, row in enumerate(rows) if row is not None and chosen[place] is None]
                for place in ended:
                    rows[place] = None
                free = [place for place, row in enumerate(rows) if row is None]
                if waiting and isinstance(cache, RefillableCache):
                    if ended:
                        cache.empty_rows(ended)
                    if len(free) * REFILL_DIVISOR >= size:
                        self._refill(cache, rows, chosen, waiting, free)
                        continue
                elif free:
                    kept = [place for place, row in enumerate(rows) if row is not None]
                    cache.keep_rows(kept)
                    rows, chosen = [rows[place] for place in kept], [chosen[place] for place in kept]
                steps = _read_every(self._choosing)
                # No row goes beyond its room, where there may be no position for its tokens.
                steps = min(steps, *(self._room[row] - len(self._generated[row]) for row in rows if row is not None))
                chosen = self._next(torch.tensor([[token or 0] for token in chosen]), cache, rows, steps=steps)

    def _begin(self, rows: Sequence[int | None], *, most_tokens: int) -> tuple[DecodingCache, list[int | None]]:
        """Return a cache that holds the rows' prompts, with room for `most_tokens` more, and their first new tokens."""
        prompts = [self._prompts[row].ids for row in rows if row is not None]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        first_slots = torch.tensor(padding, dtype=torch.int64) if any(padding) else None
        cache = self._model.new_cache(len(prompts), longest + most_tokens, first_slots=first_slots)
        input_ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
        return cache, self._next(input_ids, cache, rows)

    def _refill(
        self,
        cache: RefillableCache,
        rows: list[int | None],
        chosen: list[int | None],
        waiting: deque[int],
        free: Sequence[int],
    ) -> None:
        """Put waiting rows in the places of ended ones. Their prompts are no longer than those of the earlier rows."""
        joining: list[int | None] = [waiting.popleft() for _ in free[: len(waiting)]]
        cache.drop_padding()
        theirs, first_tokens = self._begin(joining, most_tokens=0)
        cache.replace_rows(free[: len(joining)], theirs)
        for place, row, token in zip(free, joining, first_tokens, strict=False):
            rows[place], chosen[place] = row, token

    def _next(
        self, input_ids: Tensor, cache: DecodingCache, rows: Sequence[int | None], *, steps: int = 1
    ) -> list[int | None]:
        """Choose `steps` tokens for each row, and return the last ones; None for a row that ends or has ended."""
        device = self._model.device
        numbers = self._numbers(rows, steps).to(self._choosing)
        ids, seen, chosen = input_ids, None, []
        for step in range(steps):
            if isinstance(cache, RefillableCache) and cache.is_full:
                cache.drop_padding()
            logits = self._model.logits(ids.to(device), None, cache, last_only=True)[:, -1].to(self._choosing)
            if self._sampling.repetition_penalty != 1.0:
                seen = self._seen(rows, logits) if seen is None else seen.scatter(1, ids, True)
            ids = self._choose(logits, rows, numbers[:, step], seen)[:, None]
            chosen.append(ids)
        tokens = _read(torch.cat(chosen, dim=1))
        return [None if row is None else self._add(row, tokens[place]) for place, row in enumerate(rows)]

    def _choose(self, logits: Tensor, rows: Sequence[int | None], numbers: Tensor, seen: Tensor | None) -> Tensor:
        """Return the next token [b] of each row, among its first tokens if it has no tokens yet."""
        chosen = choose_tokens(logits, sampling=self._sampling, numbers_b=numbers, seen_bv=seen)
        for place, row in enumerate(rows):
            if row is None or self._generated[row] or (among := self._prompts[row].first_tokens) is None:
                continue
            among, here = among.to(logits.device), slice(place, place + 1)
            found = choose_tokens(
                logits[here, among],
                sampling=self._sampling,
                numbers_b=numbers[here],
                seen_bv=None if seen is None else seen[here, among],
            )
            chosen[here] = among[found]
        return chosen

    def _numbers(self, rows: Sequence[int | None], steps: int) -> Tensor:
        """Return the next random numbers [b, steps] of each row, if tokens are drawn."""
        numbers = torch.zeros(len(rows), steps, dtype=torch.float64)
        if self._sampling.temperature > 0.0:
            for place, row in enumerate(rows):
                if row is not None:
                    numbers[place] = torch.rand(steps, generator=self._generators[row], dtype=torch.float64)
        return numbers

    def _seen(self, rows: Sequence[int | None], logits: Tensor) -> Tensor:
        """Return a mask [b, vocab] of the tokens that are in each row."""
        seen = torch.zeros(logits.shape, dtype=torch.bool)
        for place, row in enumerate(rows):
            if row is not None:
                seen[place, torch.tensor([*self._prompts[row].ids, *self._generated[row]])] = True
        return seen.to(logits.device)


def _read_every(device: torch.device) -> int:
    """Return the number of tokens of each row after which the host reads those that are chosen on `device`."""
    return READ_EVERY if device.type == "cuda" else 1


def _read(tokens: Tensor) -> list[list[int]]:
    """Return the tokens on the host, which waits for the device until they are computed."""
    found: list[list[int]] = tokens.tolist()
    return found


def context_length(model: CachedModel) -> int:
    """Return the number of tokens that a sequence may have; sys.maxsize if there is no limit."""
    return sys.maxsize if model.max_seq_len is None else model.max_seq_len


def _check_prompts(prompts: Sequence[Sequence[int]], *, limit: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index + 1} is empty")
        if len(prompt) >= limit:
            raise ConfigError(
                f"prompt {index + 1} has {counted(len(prompt), 'token')}, but the model's context is "
                f"{counted(limit, 'token')}, which must hold the prompt and at least one new token: shorten the prompt"
            )
