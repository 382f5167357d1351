"""Text from a model: completes prompts, and reports each piece of text as it comes. decoding.py generates the tokens.

prompt ─ encode ─ heal ─▶ generate ─ token by token ─▶ whole characters ─▶ up to a stop text ─▶ completion
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from llmtrain.data.tokenizers import Tokenizer
from llmtrain.errors import ConfigError
from llmtrain.generation.decoding import CachedModel, Prompt, context_length, generate
from llmtrain.generation.sampling import Decoding

HALF_CHARACTER = "\ufffd"
"""Character to which a tokenizer decodes the bytes of an incomplete character."""
_CONTEXT = 8
"""Tokens before a piece that are decoded with it, since some tokenizers drop the first blank of a text."""

OnText = Callable[[int, str], None]
"""Called with (row, piece) for each new piece of text. The pieces of a row, joined, are its completion."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Text that a model wrote after a prompt."""

    prompt: str
    completion: str
    tokens: int
    """Number of tokens that the model chose, including those of a stop text."""
    ended_by: Literal["end", "stop", "length"]
    """end: a stop token; stop: a stop text; length: the limit of new tokens, or the model's context."""
    rendered: str | None = None
    """Text that the model read, if it is not the prompt itself: the prompt rendered by a chat template."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt with its tokens, which may differ from those of `text`: a chat template may have added some."""

    text: str
    ids: list[int]


def complete(
    model: CachedModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str | TokenizedPrompt],
    how: Decoding,
    *,
    stop: Sequence[str] = (),
    stop_ids: Collection[int] = (),
    heal: bool = True,
    on_text: OnText | None = None,
) -> list[Completion]:
    """Return a completion of each prompt, in their order. A completion does not depend on the other prompts.

    A completion ends before the first of the texts `stop`, and at the tokens `stop_ids`. With `heal`, the model may
    replace the prompt's last token (see `heal_prompt`); that counts as one of `how.max_new_tokens`.

    Raises ConfigError if a prompt does not fit into the model's context, or if a stop text is empty.
    """
    if "" in stop:
        raise ConfigError("a stop text is empty; remove it")
    tokenized = [_tokenized(prompt, tokenizer) for prompt in prompts]
    context = context_length(model)
    starts = _starts(tokenized, tokenizer, context=context, heal=heal)
    growing = [_GrowingText(tokenizer, start, stop=stop) for start in starts]

    def add_token(row: int, token: int) -> bool:
        piece = growing[row].add(token)
        if piece and on_text is not None:
            on_text(row, piece)
        return not growing[row].stopped

    firsts = [Prompt(start.kept, start.first_tokens) for start in starts]
    generated = generate(model, firsts, how, stop_ids=stop_ids, on_token=add_token)
    completions = []
    for row, (prompt, start, tokens) in enumerate(zip(tokenized, starts, generated, strict=True)):
        rest = growing[row].end()
        if rest and on_text is not None:
            on_text(row, rest)
        room = min(how.max_new_tokens, context - len(start.kept))
        ended: Literal["end", "length"] = "length" if len(tokens) == room else "end"
        completions.append(
            Completion(
                prompt=prompt.text,
                completion=growing[row].text,
                tokens=len(tokens),
                ended_by="stop" if growing[row].stopped else ended,
            )
        )
    return completions


def _tokenized(prompt: str | TokenizedPrompt, tokenizer: Tokenizer) -> TokenizedPrompt:
    if isinstance(prompt, TokenizedPrompt):
        return prompt
    # An end token stands between documents, so after it a document begins.
    return TokenizedPrompt(prompt, tokenizer.encode(prompt) or [tokenizer.eos_id])


def _starts(
    prompts: Sequence[TokenizedPrompt], tokenizer: Tokenizer, *, context: int, heal: bool
) -> list[HealedPrompt]:
    texts = tokenizer.token_texts() if heal and prompts else None
    return [
        heal_prompt(prompt.ids, texts, begin_id=tokenizer.eos_id)
        # A prompt that is too long is not shortened, so that the error gives its full length.
        if texts is not None and len(prompt.ids) < context
        else HealedPrompt(prompt.ids, [], None)
        for prompt in prompts
    ]


class HealedPrompt(NamedTuple):
    """A prompt whose last token may be replaced (token healing)."""

    kept: list[int]
    """Tokens that the model reads."""
    removed: list[int]
    """The prompt's last token, if it was removed. The text of the first generated token begins with its text."""
    first_tokens: Tensor | None
    """Ids from which the first generated token is chosen; None: any."""


def heal_prompt(ids: list[int], texts: Sequence[str], *, begin_id: int) -> HealedPrompt:
    """Remove the prompt's last token if longer tokens begin with its text; the first generated token is one of these.

    In the training data, `:` before a line end is part of the token `:⏎    `, so the token `:` alone never stood before
    a line end, and a model that reads it continues badly. So the model chooses between the token and the longer ones,
    and the text of the prompt is kept. `texts` has the text of each token; `begin_id` stands for a prompt without
    tokens.
    """
    text = texts[ids[-1]]
    if not text or HALF_CHARACTER in text:
        return HealedPrompt(ids, [], None)
    longer = [index for index, other in enumerate(texts) if other.startswith(text)]
    if len(longer) == 1:
        return HealedPrompt(ids, [], None)
    return HealedPrompt(ids[:-1] or [begin_id], ids[-1:], torch.tensor(longer))


class _GrowingText:
    """The text of a completion: takes tokens, and returns pieces of text that no later token changes."""

    def __init__(self, tokenizer: Tokenizer, start: HealedPrompt, *, stop: Sequence[str]) -> None:
        self._decode = tokenizer.decode
        self._stop = stop
        self._window = start.kept[-_CONTEXT:]
        self._new: list[int] = []
        """Tokens after the window whose text is not in `text` yet."""
        self._known = len(self._decode([*self._window, *start.removed]))
        """Number of characters of the window's text, which `text` or the prompt has already."""
        self._returned = 0
        """Number of characters of `text` that were returned."""
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Add a token, and return the text that is now certain: no half of a character, no beginning of a stop text."""
        self._new.append(token)
        text = self._decode([*self._window, *self._new])
        if text.endswith(HALF_CHARACTER):
            return ""
        self._append(text[self._known :])
        self._window, self._new = self._new, []
        self._known = len(self._decode(self._window))
        return self._up_to(len(self.text) - (0 if self.stopped else self._held_back()))

    def end(self) -> str:
        """Return the text that `add` has held back, after the last token."""
        if self._new and not self.stopped:
            self._append(self._decode([*self._window, *self._new])[self._known :])
            self._new = []
        return self._up_to(len(self.text))

    def _append(self, piece: str) -> None:
        begin = max(0, len(self.text) - max(map(len, self._stop), default=1) + 1)
        self.text += piece
        found = [place for stop in self._stop if (place := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """Return the length of the longest end of the text with which a stop text begins."""
        sizes = [size for stop in self._stop for size in range(1, len(stop)) if self.text.endswith(stop[:size])]
        return max(sizes, default=0)

    def _up_to(self, end: int) -> str:
        """Return the text up to the character `end` that was not returned before."""
        piece = self.text[self._returned : end]
        self._returned = max(self._returned, end)
        return piece
