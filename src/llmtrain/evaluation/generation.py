"""Tokens from a model, one by one: batched, with a key/value cache. Text is text.py's, the choice sampling.py's.

    prompts ─ padded on the left ─ one forward for all ─▶ scores of the next token ─ choose_token per row ─┐
                                        ▲                                                                 │
                                        └────────── one forward with the chosen tokens ◀──────────────────┘

    rows that wait ─ one forward ─▶ the places of rows that have ended, where the cache can take them

A row's result depends on its prompt and the seed, not on what else is in the batch.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.distributed.sharding import without_gradients
from llmtrain.evaluation.sampling import Sampling, choose_token, generators_for


class DecodingCache(Protocol):
    """What generation needs of a model's cache, besides handing it back to the model."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
        ...


@runtime_checkable
class RefillableCache(DecodingCache, Protocol):
    """A cache in which rows that have ended can make place for others."""

    @property
    def is_full(self) -> bool:
        """Whether the next token has no slot."""
        ...

    def empty_rows(self, rows: Sequence[int]) -> None:
        """Forget the tokens of these rows, whose places stay."""
        ...

    def replace_rows(self, rows: Sequence[int], other: Any) -> None:
        """Put the rows of another cache, which are no longer, in their places."""
        ...

    def drop_padding(self) -> None:
        """Take out what is padding in all rows."""
        ...


class CachedModel(Protocol):
    """What generation needs of a model."""

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence, in tokens; None: there is no limit."""
        ...

    @property
    def device(self) -> torch.device:
        """Where tokens should be."""
        ...

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> DecodingCache:
        """An empty cache for rows whose first `first_slots[b]` tokens are padding."""
        ...

    def logits(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: Any = None, *, last_only: bool = False
    ) -> Tensor:
        """[b, t, vocab] scores of the token after each of `input_ids`, which follow the cache's tokens and join it."""
        ...


FREE_TO_REFILL = 4
"""A batch is filled up when one in so many of its places is free: a few prompts together cost little more than one."""

Watch = Callable[[int, int], bool]
"""Told of each token as it comes, (row, token); says whether the row goes on after it."""


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    stop_ids: Collection[int] = (),
    batch_size: int | None = None,
    first_tokens: Sequence[Tensor | None] | None = None,
    draw_keys: Sequence[str] | None = None,
    watch: Watch | None = None,
    on_end: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt and without the stop token, in the prompts' order.

    A row ends after `max_new_tokens`, at one of `stop_ids` (`watch` is not told of it), where `watch` says so, or where
    the model's context is full. `batch_size` rows, of similar lengths, are computed at a time; all of them when it is
    None. `first_tokens` are the ids among which a row's first token is. A row's draws depend on the seed and its
    `draw_keys`; on its prompt and how often that came before where there are none. `on_end` is told of each row that
    has ended. The model should be in evaluation mode.

    Raises:
        ConfigError: a prompt is empty or leaves no room in the context, or a setting is out of its range.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} is {value}; it should be at least 1")
    limit = context_of(model)
    _check_prompts(prompts, limit=limit)
    how = sampling or Sampling()
    firsts = first_tokens or [None] * len(prompts)
    # Two prompts may share all but the token that was taken off, and are still two.
    keys: list[Sequence[int]] = [
        prompt if first is None else [*prompt, -1, *first.tolist()]
        for prompt, first in zip(prompts, firsts, strict=True)
    ]
    generators = generators_for(keys if draw_keys is None else draw_keys, seed=how.seed)
    likeliest_alone = how.temperature == 0.0 and how.repetition_penalty == 1.0
    generated: list[list[int]] = [[] for _ in prompts]

    def choose(row: int, logits_v: Tensor, likeliest: int) -> int | None:
        """The row's next token, to go on with; None where the row ends."""
        among = None if generated[row] else firsts[row]
        if likeliest_alone and among is None:
            token = likeliest
        else:
            seen = [*prompts[row], *generated[row]] if how.repetition_penalty != 1.0 else []
            token = choose_token(logits_v, sampling=how, seen=seen, generator=generators[row], among=among)
        if token not in stop_ids:
            generated[row].append(token)
            goes_on = watch is None or watch(row, token)
            if goes_on and len(generated[row]) < room[row]:
                return token
        on_end(row)
        return None

    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    batches = _Batches(model, prompts, choose=choose, likeliest_alone=likeliest_alone and first_tokens is None)
    with without_gradients(model):
        batches.decode(deque(by_length), size=batch_size or max(1, len(prompts)), most_tokens=max(room, default=0))
    return generated


class _Batches:
    """Rows that are computed together: those that end make place for others, where the model's cache lets them."""

    def __init__(
        self,
        model: CachedModel,
        prompts: Sequence[Sequence[int]],
        *,
        choose: Callable[[int, Tensor, int], int | None],
        likeliest_alone: bool,
    ) -> None:
        """`choose` is given the scores of a row's next token, and the likeliest; it gives the one to go on with.

        It gives None where the row ends. With `likeliest_alone` the scores stay where they are, and one number a row is
        fetched.
        """
        self._model, self._prompts, self._choose, self._likeliest_alone = model, prompts, choose, likeliest_alone

    def decode(self, waiting: deque[int], *, size: int, most_tokens: int) -> None:
        """All rows that wait, the longest prompts first, until `choose` has ended them; `size` at a time."""
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
                    if len(free) * FREE_TO_REFILL >= size:
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
        """The rows' prompts in a cache with room for `most_tokens` more, and their first tokens."""
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
        """Rows that wait take the places of those that have ended; their prompts are no longer than those before."""
        joining: list[int | None] = [waiting.popleft() for _ in free[: len(waiting)]]
        cache.drop_padding()
        theirs, first_tokens = self._begin(joining, most_tokens=0)
        cache.replace_rows(free[: len(joining)], theirs)
        for place, row, token in zip(free, joining, first_tokens, strict=False):
            rows[place], chosen[place] = row, token

    def _next(self, input_ids: Tensor, cache: DecodingCache, rows: Sequence[int | None]) -> list[int | None]:
        """What follows in each row; None where it ends, or has ended."""
        logits = self._model.logits(input_ids.to(self._model.device), None, cache, last_only=True)[:, -1]
        likeliest = logits.argmax(-1).tolist()
        logits = logits if self._likeliest_alone else logits.float().cpu()
        return [
            None if row is None else self._choose(row, logits[place], likeliest[place])
            for place, row in enumerate(rows)
        ]


def context_of(model: CachedModel) -> int:
    """Tokens that a sequence may have."""
    return sys.maxsize if model.max_seq_len is None else model.max_seq_len


def _check_prompts(prompts: Sequence[Sequence[int]], *, limit: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index + 1} is empty")
        if len(prompt) >= limit:
            raise ConfigError(
                f"prompt {index + 1} has {len(prompt)} tokens, but the model's context is {limit} tokens, which must "
                "hold the prompt and at least one token after it: shorten the prompt"
            )
