"""`generate` and `complete` with their settings as plain keywords, which tests read more easily."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmtrain.data.tokenizers import Tokenizer
from llmtrain.generation import completion, decoding
from llmtrain.generation.sampling import Decoding, Sampling


def generate(
    model: decoding.CachedModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    batch_size: int | None = None,
    first_tokens: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> list[list[int]]:
    """Return the tokens that follow each prompt; `first_tokens`: ids among which a row's first one is."""
    how = Decoding(max_new_tokens=max_new_tokens, sampling=sampling or Sampling(), batch_size=batch_size)
    firsts = first_tokens or [None] * len(prompts)
    asked = [decoding.Prompt(prompt, first) for prompt, first in zip(prompts, firsts, strict=True)]
    return decoding.generate(model, asked, how, **options)


def complete(
    model: decoding.CachedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int | None = None,
    **options: Any,
) -> list[completion.Completion]:
    """Return a completion of each prompt."""
    how = Decoding(max_new_tokens=max_new_tokens, sampling=sampling, batch_size=batch_size)
    return completion.complete(model, tokenizer, prompts, how, **options)
