"""Text from a model: prompts in, completions out, told piece by piece as they grow. Tokens are decoding.py's.

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
from llmtrain.generation.decoding import CachedModel, Prompt, context_of, generate
from llmtrain.generation.sampling import Decoding

HALF_CHARACTER = "\ufffd"
"""Character that a tokenizer decodes an incomplete character's bytes to."""
_CONTEXT = 8
"""Tokens before a piece that are decoded with it, since some tokenizers drop a text's first blank."""

OnText = Callable[[int, str], None]
"""Told of each new piece of text, (row, piece); the pieces of a row together are its completion."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Text that a model wrote after a prompt."""

    prompt: str
    completion: str
    tokens: int
    """Number of tokens that the model chose, those of a stop text included."""
    ended_by: Literal["end", "stop", "length"]
    """A stop token, a stop text, or the limit of tokens (asked for, or the model's context)."""
    rendered: str | None = None
    """Text that the model read, if it is more than the prompt: a turn put through a chat template."""


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt whose tokens are not just the tokenizer's of its text: a turn put through a chat template, say."""

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
    """Return a completion of each prompt, in their order; the same in any batch, whatever stands beside it.

    A completion ends before the first of the texts `stop`, and at the tokens `stop_ids`. `heal` lets the model choose
    the prompt's last token anew (see `heal_prompt`); it counts as one of `how.max_new_tokens`.

    Raises ConfigError if a prompt does not fit, or a stop text is empty.
    """
    if "" in stop:
        raise ConfigError("a stop text is empty; remove it")
    asked = [_tokenized(prompt, tokenizer) for prompt in prompts]
    context = context_of(model)
    starts = _starts(asked, tokenizer, context=context, heal=heal)
    growing = [_Growing(tokenizer, start, stop=stop) for start in starts]

    def watch(row: int, token: int) -> bool:
        piece = growing[row].add(token)
        if piece and on_text is not None:
            on_text(row, piece)
        return not growing[row].stopped

    firsts = [Prompt(start.kept, start.first_tokens) for start in starts]
    generated = generate(model, firsts, how, stop_ids=stop_ids, watch=watch)
    completions = []
    for row, (prompt, start, tokens) in enumerate(zip(asked, starts, generated, strict=True)):
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
    # An end token stands before every document, so it also says that one begins.
    return TokenizedPrompt(prompt, tokenizer.encode(prompt) or [tokenizer.eos_id])


def _starts(
    prompts: Sequence[TokenizedPrompt], tokenizer: Tokenizer, *, context: int, heal: bool
) -> list[HealedPrompt]:
    texts = tokenizer.token_texts() if heal and prompts else None
    return [
        heal_prompt(prompt.ids, texts, begin_id=tokenizer.eos_id)
        # A prompt that is too long is rejected with its own length.
        if texts is not None and len(prompt.ids) < context
        else HealedPrompt(prompt.ids, [], None)
        for prompt in prompts
    ]


class HealedPrompt(NamedTuple):
    """Beginning of a completion."""

    kept: list[int]
    """Tokens that the model reads."""
    removed: list[int]
    """The prompt's last token, whose text the first generated token begins with; or none."""
    first_tokens: Tensor | None
    """Ids among which the first generated token is; None: all."""


def heal_prompt(ids: list[int], texts: Sequence[str], *, begin_id: int) -> HealedPrompt:
    """Take the last token off, where there are longer ones that begin with its text, and generate one of these.

    In the data, `:` before a line end is part of the token `:⏎    `, so after the token `:` alone no line ever ended: a
    model that is given it goes on badly. What it is not bound to is a choice between the two, and it keeps the prompt.
    `texts` are what each token adds to a text; `begin_id` is read where nothing else is left.
    """
    text = texts[ids[-1]]
    if not text or HALF_CHARACTER in text:
        return HealedPrompt(ids, [], None)
    longer = [index for index, other in enumerate(texts) if other.startswith(text)]
    if len(longer) == 1:
        return HealedPrompt(ids, [], None)
    return HealedPrompt(ids[:-1] or [begin_id], ids[-1:], torch.tensor(longer))


class _Growing:
    """A completion as it grows: tokens in, pieces of text out that will not be taken back."""

    def __init__(self, tokenizer: Tokenizer, start: HealedPrompt, *, stop: Sequence[str]) -> None:
        self._decode = tokenizer.decode
        self._stop = stop
        self._window = start.kept[-_CONTEXT:]
        self._new: list[int] = []
        """Tokens at the window's end whose text is not in `text` yet."""
        self._known = len(self._decode([*self._window, *start.removed]))
        """Characters of the window's text that are in `text`, or in the prompt."""
        self._told = 0
        self.text = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """The piece of text that a token completes; nothing while it may become half of a character or a stop text."""
        self._new.append(token)
        text = self._decode([*self._window, *self._new])
        if text.endswith(HALF_CHARACTER):
            return ""
        self._append(text[self._known :])
        self._window, self._new = self._new, []
        self._known = len(self._decode(self._window))
        return self._tell(len(self.text) - (0 if self.stopped else self._held_back()))

    def end(self) -> str:
        """The piece that was held back, once no token follows."""
        if self._new and not self.stopped:
            self._append(self._decode([*self._window, *self._new])[self._known :])
            self._new = []
        return self._tell(len(self.text))

    def _append(self, piece: str) -> None:
        begin = max(0, len(self.text) - max(map(len, self._stop), default=1) + 1)
        self.text += piece
        found = [place for stop in self._stop if (place := self.text.find(stop, begin)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True

    def _held_back(self) -> int:
        """The longest end of the text that a stop text may begin with."""
        sizes = [size for stop in self._stop for size in range(1, len(stop)) if self.text.endswith(stop[:size])]
        return max(sizes, default=0)

    def _tell(self, end: int) -> str:
        piece = self.text[self._told : end]
        self._told = max(self._told, end)
        return piece
