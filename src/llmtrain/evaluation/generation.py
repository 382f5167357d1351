"""Text from a model, token by token: batched, with a key/value cache. Tokenizers are the caller's.

    prompts ─ padded on the left ─ one forward for all ─▶ scores of the next token ─ choose_token per row ─┐
                                        ▲                                                                 │
                                        └────────── one forward with the chosen tokens ◀──────────────────┘

A row's result depends on its prompt and the seed, not on what else is in the batch.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from llmtrain.config.errors import ConfigError


class DecodingCache(Protocol):
    """What generation needs of a model's cache, besides handing it back to the model."""

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Forget all other rows."""
        ...


class CachedModel(Protocol):
    """What generation needs of a model."""

    @property
    def max_seq_len(self) -> int:
        """The longest sequence, in tokens."""
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


def generate(
    model: CachedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt and without the end token.

    A row ends after `max_new_tokens`, at `eos_id`, or where the model's context is full. At temperature 0 the likeliest
    token is taken, and `top_k`, `top_p` and `seed` have no effect. The model should be in evaluation mode.

    Raises:
        ConfigError: a prompt is empty or leaves no room in the context, or a setting is out of its range.
    """
    _check_settings(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
    )
    _check_prompts(prompts, limit=model.max_seq_len)
    if not prompts:
        return []
    longest = max(len(prompt) for prompt in prompts)
    padding = [longest - len(prompt) for prompt in prompts]
    room = [min(max_new_tokens, model.max_seq_len - len(prompt)) for prompt in prompts]
    generators = _generators(prompts, seed=seed)

    generated: list[list[int]] = [[] for _ in prompts]
    running = list(range(len(prompts)))
    input_ids = torch.tensor([[0] * pad + list(prompt) for pad, prompt in zip(padding, prompts, strict=True)])
    with torch.inference_mode():
        cache = model.new_cache(len(prompts), longest + max(room), first_slots=torch.tensor(padding, dtype=torch.int64))
        while running:
            logits = model.logits(input_ids.to(model.device), None, cache, last_only=True)[:, -1].float().cpu()
            kept = []
            for index, row in enumerate(running):
                token = choose_token(
                    logits[index],
                    seen=[*prompts[row], *generated[row]],
                    temperature=temperature,
                    top_k=top_k,
                    top_p=top_p,
                    repetition_penalty=repetition_penalty,
                    generator=generators[row],
                )
                if token == eos_id:
                    continue
                generated[row].append(token)
                if len(generated[row]) < room[row]:
                    kept.append(index)
            if len(kept) < len(running):
                running = [running[index] for index in kept]
                cache.keep_rows(kept)
            input_ids = torch.tensor([[generated[row][-1]] for row in running])
    return generated


def choose_token(
    logits_v: Tensor,
    *,
    seen: Sequence[int],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float,
    generator: torch.Generator,
) -> int:
    """One token, from scores over the vocabulary.

    In this order: the repetition penalty (Keskar et al. 2019, arXiv:1909.05858: scores of tokens seen before are
    divided by it when positive and multiplied when negative, so that it always lowers them), temperature, the `top_k`
    likeliest, the fewest likeliest that together reach `top_p`. A draw takes one number from the generator, whatever
    the settings.
    """
    logits_v = logits_v.double()
    if repetition_penalty != 1.0:
        ids = torch.tensor(sorted(set(seen)))
        scores = logits_v[ids]
        penalised = torch.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
        logits_v = logits_v.index_copy(0, ids, penalised)
    if temperature == 0.0:
        return int(logits_v.argmax())
    scores, order = (logits_v / temperature).sort(descending=True, stable=True)
    if top_k is not None:
        scores, order = scores[:top_k], order[:top_k]
    reached = torch.softmax(scores, dim=0).cumsum(0)
    last = len(order) - 1
    if top_p is not None:
        last = min(last, int((reached < top_p).sum()))
    threshold = torch.rand((), generator=generator, dtype=torch.float64) * reached[last]
    return int(order[min(last, int((reached <= threshold).sum()))])


def _generators(prompts: Sequence[Sequence[int]], *, seed: int) -> list[torch.Generator]:
    """One a row, seeded by the seed, the prompt and, among equal prompts, the number of the occurrence."""
    occurrences: Counter[tuple[int, ...]] = Counter()
    generators = []
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(f"{seed}/{occurrences[key]}/{key}".encode()).digest()
        occurrences[key] += 1
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
    return generators


def _check_settings(
    *, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}; it should be at least 1")
    if not temperature >= 0.0:
        raise ConfigError(f"temperature is {temperature}; it should be 0 (the likeliest token) or more")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k is {top_k}; it should be at least 1")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ConfigError(f"top_p is {top_p}; it should be over 0 and at most 1")
    if not repetition_penalty > 0.0:
        raise ConfigError(f"repetition_penalty is {repetition_penalty}; it should be over 0 (1 is none)")


def _check_prompts(prompts: Sequence[Sequence[int]], *, limit: int) -> None:
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index + 1} is empty")
        if len(prompt) >= limit:
            raise ConfigError(
                f"prompt {index + 1} has {len(prompt)} tokens, but the model's context is {limit} tokens, which must "
                "hold the prompt and at least one token after it: shorten the prompt"
            )
