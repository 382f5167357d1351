"""Tokens from a model, one by one: batched, with a key/value cache. Text is completion.py's, the choice sampling.py's.

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
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from llmtrain.distributed.sharding import without_gradients
from llmtrain.errors import ConfigError
from llmtrain.generation.sampling import Decoding, choose_token, generators_for
from llmtrain.screen import counted


class DecodingCache(Protocol):
    """Methods that generation needs of a model's cache, besides handing it back to the model."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
        ...


@runtime_checkable
class RefillableCache(DecodingCache, Protocol):
    """A cache in which rows that have ended can make place for others."""

    @property
    def is_full(self) -> bool:
        """True if the cache has no slot for the next token."""
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
    """Methods that generation needs of a model."""

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence, in tokens; None: there is no limit."""
        ...

    @property
    def device(self) -> torch.device:
        """Device on which tokens should be."""
        ...

    def new_cache(self, batch_size: int, max_len: int, *, first_slots: Tensor | None = None) -> DecodingCache:
        """An empty cache for rows whose first `first_slots[b]` tokens are padding."""
        ...

    def logits(
        self, input_ids: Tensor, document_ids: Tensor | None = None, cache: Any = None, *, last_only: bool = False
    ) -> Tensor:
        """[b, t, vocab] scores of the token after each of `input_ids`, which follow the cache's tokens and join it."""
        ...


@dataclass(frozen=True)
class Prompt:
    """Tokens that a row begins with."""

    ids: Sequence[int]
    first_tokens: Tensor | None = None
    """Ids among which the row's first new token is; None: all."""
    draw_key: str | None = None
    """Key of the row's draws, besides the seed; None: the prompt, and how often it came before."""

    @property
    def key(self) -> Sequence[int] | str:
        """Return the key of the row's draws."""
        if self.draw_key is not None:
            return self.draw_key
        # Two prompts may share all but the token that was taken off, and are still two.
        return self.ids if self.first_tokens is None else [*self.ids, -1, *self.first_tokens.tolist()]


FREE_TO_REFILL = 4
"""A batch is filled up when one in so many of its places is free: a few prompts together cost little more than one."""

Watch = Callable[[int, int], bool]
"""Told of each token as it comes, (row, token); says whether the row goes on after it."""


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int] | Prompt],
    how: Decoding,
    *,
    stop_ids: Collection[int] = (),
    watch: Watch | None = None,
    on_end: Callable[[int], None] = lambda _: None,
) -> list[list[int]]:
    """Return the tokens that follow each prompt, without the prompt and the stop token, in the prompts' order.

    A row ends after `how.max_new_tokens`, at one of `stop_ids` (`watch` is not told of it), where `watch` says so, or
    where the model's context is full. Rows of similar lengths are computed together. A row's draws depend on the seed
    and its `Prompt.key` alone. `on_end` is told of each row that has ended. The model should be in evaluation mode.

    Raises ConfigError if a prompt is empty or leaves no room in the context.
    """
    asked = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    limit, sampling = context_of(model), how.sampling
    _check_prompts([prompt.ids for prompt in asked], limit=limit)
    generators = generators_for([prompt.key for prompt in asked], seed=sampling.seed)
    greedy = sampling.temperature == 0.0 and sampling.repetition_penalty == 1.0
    room = [min(how.max_new_tokens, limit - len(prompt.ids)) for prompt in asked]
    generated: list[list[int]] = [[] for _ in asked]

    def choose(row: int, logits_v: Tensor, likeliest: int) -> int | None:
        """Return the row's next token, to go on with; None where the row ends."""
        among = None if generated[row] else asked[row].first_tokens
        if greedy and among is None:
            token = likeliest
        else:
            seen = [*asked[row].ids, *generated[row]] if sampling.repetition_penalty != 1.0 else []
            token = choose_token(logits_v, sampling=sampling, seen=seen, generator=generators[row], among=among)
        if token not in stop_ids:
            generated[row].append(token)
            goes_on = watch is None or watch(row, token)
            if goes_on and len(generated[row]) < room[row]:
                return token
        on_end(row)
        return None

    by_length = sorted(range(len(asked)), key=lambda row: len(asked[row].ids), reverse=True)
    likeliest_alone = greedy and all(prompt.first_tokens is None for prompt in asked)
    batches = _Batches(model, [prompt.ids for prompt in asked], choose=choose, likeliest_alone=likeliest_alone)
    with without_gradients(model):
        batches.decode(deque(by_length), size=how.batch_size or max(1, len(asked)), most_tokens=max(room, default=0))
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
        """Return the next token of each row; None where it ends, or has ended."""
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
                f"prompt {index + 1} has {counted(len(prompt), 'token')}, but the model's context is "
                f"{counted(limit, 'token')}, which must "
                "hold the prompt and at least one token after it: shorten the prompt"
            )
