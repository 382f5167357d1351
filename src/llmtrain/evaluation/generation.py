"""Tokens from a model, one by one: batched, with a key/value cache. Text is text.py's, the choice sampling.py's.

    prompts ─ padded on the left ─ one forward for all ─▶ scores of the next token ─ choose_token per row ─┐
                                        ▲                                                                 │
                                        └────────── one forward with the chosen tokens ◀──────────────────┘

A row's result depends on its prompt and the seed, not on what else is in the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError
from llmtrain.evaluation.sampling import Sampling, choose_token, generators_for


class DecodingCache(Protocol):
    """What generation needs of a model's cache, besides handing it back to the model."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
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
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt and without the stop token, in the prompts' order.

    A row ends after `max_new_tokens`, at one of `stop_ids` (`watch` is not told of it), where `watch` says so, or where
    the model's context is full. `batch_size` rows, of similar lengths, are computed at a time; all of them when it is
    None. `first_tokens` are the ids among which a row's first token is. A row's draws depend on the seed and its
    `draw_keys`; on its prompt and how often that came before where there are none. The model should be in evaluation
    mode.

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
        if token in stop_ids:
            return None
        generated[row].append(token)
        goes_on = watch is None or watch(row, token)
        return token if goes_on and len(generated[row]) < room[row] else None

    room = [min(max_new_tokens, limit - len(prompt)) for prompt in prompts]
    by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    size = batch_size or max(1, len(prompts))
    for begin in range(0, len(prompts), size):
        batch = by_length[begin : begin + size]
        _decode_batch(
            model,
            {row: prompts[row] for row in batch},
            max_new_tokens=max(room[row] for row in batch),
            choose=choose,
            likeliest_alone=likeliest_alone and first_tokens is None,
        )
    return generated


@torch.inference_mode()
def _decode_batch(
    model: CachedModel,
    prompts: Mapping[int, Sequence[int]],
    *,
    max_new_tokens: int,
    choose: Callable[[int, Tensor, int], int | None],
    likeliest_alone: bool,
) -> None:
    """Let `choose` have the scores of each row's next token, and the likeliest, until it has ended all of them.

    With `likeliest_alone` the scores stay where they are, and one number a row is fetched.
    """
    longest = max(map(len, prompts.values()))
    padding = [longest - len(prompt) for prompt in prompts.values()]
    cache = model.new_cache(
        len(prompts), longest + max_new_tokens, first_slots=torch.tensor(padding, dtype=torch.int64)
    )
    input_ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts.values(), strict=True)])
    running = list(prompts)
    while running:
        logits = model.logits(input_ids.to(model.device), None, cache, last_only=True)[:, -1]
        likeliest = logits.argmax(-1).tolist()
        logits = logits if likeliest_alone else logits.float().cpu()
        chosen = [choose(row, logits[index], likeliest[index]) for index, row in enumerate(running)]
        kept = [index for index, token in enumerate(chosen) if token is not None]
        if len(kept) < len(running):
            running = [running[index] for index in kept]
            cache.keep_rows(kept)
        input_ids = torch.tensor([[chosen[index]] for index in kept])


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
