"""Generates tokens from a model, one at a time, in batches, with a key/value cache.

    prompts ─ padded on the left ─ one forward pass for all ─▶ logits of the next token ─ choose_token per row ─┐
                                        ▲                                                                      │
                                        └────────── one forward pass with the chosen tokens ◀──────────────────┘

    waiting rows ─ one forward pass ─▶ the places of rows that have ended, if the cache can be refilled

A row's result depends on its prompt and the seed, not on what else is in the batch. completion.py makes text of the
tokens; sampling.py chooses them.
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
from llmtrain.generation.sampling import Decoding, choose_token, generators_for
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
    limit, sampling = context_length(model), how.sampling
    _check_prompts([prompt.ids for prompt in rows], limit=limit)
    generators = generators_for([prompt.key for prompt in rows], seed=sampling.seed)
    greedy = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0
    room = [min(how.max_new_tokens, limit - len(prompt.ids)) for prompt in rows]
    generated: list[list[int]] = [[] for _ in rows]

    def choose(row: int, logits_v: Tensor, likeliest: int) -> int | None:
        """Return the row's next token; None if the row ends."""
        among = None if generated[row] else rows[row].first_tokens
        if greedy and among is None:
            token = likeliest
        else:
            seen = [*rows[row].ids, *generated[row]] if sampling.repetition_penalty != 1.0 else []
            token = choose_token(logits_v, sampling=sampling, seen=seen, generator=generators[row], among=among)
        if token not in stop_ids:
            generated[row].append(token)
            continues = on_token is None or on_token(row, token)
            if continues and len(generated[row]) < room[row]:
                return token
        on_end(row)
        return None

    by_length = sorted(range(len(rows)), key=lambda row: len(rows[row].ids), reverse=True)
    needs_logits = not greedy or any(prompt.first_tokens is not None for prompt in rows)
    batches = _Batches(model, [prompt.ids for prompt in rows], choose=choose, needs_logits=needs_logits)
    with without_gradients(model):
        batches.decode(deque(by_length), size=how.batch_size or max(1, len(rows)), most_tokens=max(room, default=0))
    return generated


class _Batches:
    """Decodes rows in batches. Rows that end are replaced by waiting rows if the model's cache can be refilled."""

    def __init__(
        self,
        model: CachedModel,
        prompts: Sequence[Sequence[int]],
        *,
        choose: Callable[[int, Tensor, int], int | None],
        needs_logits: bool,
    ) -> None:
        """Set the model, the rows' prompts and the choice of tokens.

        `choose(row, logits, likeliest)` returns the row's next token from the logits [vocab] and the likeliest token;
        None ends the row. Without `needs_logits`, the logits stay on the model's device, and only the likeliest token
        of each row is copied to the CPU.
        """
        self._model, self._prompts, self._choose, self._needs_logits = model, prompts, choose, needs_logits

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
                if isinstance(cache, RefillableCache) and cache.is_full:
                    cache.drop_padding()
                chosen = self._next(torch.tensor([[token or 0] for token in chosen]), cache, rows)

    def _begin(self, rows: Sequence[int | None], *, most_tokens: int) -> tuple[DecodingCache, list[int | None]]:
        """Return a cache that holds the rows' prompts, with room for `most_tokens` more, and their first new tokens."""
        prompts = [self._prompts[row] for row in rows if row is not None]
        longest = max(map(len, prompts))
        padding = [longest - len(prompt) for prompt in prompts]
        cache = self._model.new_cache(
            len(prompts), longest + most_tokens, first_slots=torch.tensor(padding, dtype=torch.int64)
        )
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

    def _next(self, input_ids: Tensor, cache: DecodingCache, rows: Sequence[int | None]) -> list[int | None]:
        """Return the next token of each row; None for a row that ends or has ended."""
        logits = self._model.logits(input_ids.to(self._model.device), None, cache, last_only=True)[:, -1]
        likeliest = logits.argmax(-1).tolist()
        logits = logits.float().cpu() if self._needs_logits else logits
        return [
            None if row is None else self._choose(row, logits[place], likeliest[place])
            for place, row in enumerate(rows)
        ]


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
