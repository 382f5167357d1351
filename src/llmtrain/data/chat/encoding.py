"""Text and spans of characters -> tokens and which of them are learned.

Each text is tokenised once and undivided, as it is when the model is used. A token is learned when its first character
is in a span. So a token that begins before a span and reaches into it is given to the model, which never has to write
it; a token that begins in a span and reaches out of it has to be written. The border between a prompt and its
completion is wherever the row has it, so no token may cross it (`prompt_is_prefix`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import processors

from llmtrain.data.chat.supervision import Rendered
from llmtrain.data.chat.templates import ChatTemplate, adds_bos
from llmtrain.data.tokenizers import repeatable_copy
from llmtrain.errors import ConfigError


class Encoded(NamedTuple):
    """A text as tokens."""

    input_ids: NDArray[np.int32]
    """[n]"""
    supervised: NDArray[np.bool_]
    """[n]; never the first token, which nothing predicts."""
    prompt_is_prefix: bool
    """True if the sample begins with the tokens of the prompt alone, or has no prompt."""
    splits_token: bool
    """True if a span begins inside a token, which then is not learned."""


class ChatEncoder:
    """Tokenises rendered rows. The tokenizer itself is not touched."""

    def __init__(self, template: ChatTemplate) -> None:
        """Raises ConfigError when the template's tokenizer has no end token."""
        tokenizer = template.tokenizer
        if tokenizer.eos_token_id is None:
            raise ConfigError("the tokenizer has no end token (eos_token): the model could not learn where to stop")
        self.template = template
        self._backend: Any = repeatable_copy(tokenizer)
        self._adds_bos = adds_bos(tokenizer, self._backend)
        # It has nothing left to do but to trim blanks off the offsets, which would hide where a token begins.
        self._backend.post_processor = processors.Sequence([])
        self.eos_id = int(tokenizer.eos_token_id)
        self.bos_id = None if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)

    def encode(self, batch: Sequence[Rendered]) -> list[Encoded]:
        """Return the tokens of each text.

        It begins with one BOS token, if the tokenizer adds it and no template does. It ends with a learned end token,
        unless the text ends in a control token already.
        """
        encodings = self._backend.encode_batch([rendered.text for rendered in batch], add_special_tokens=False)
        with_prompt = [index for index, rendered in enumerate(batch) if rendered.prompt]
        prompts = self._backend.encode_batch([batch[index].prompt for index in with_prompt], add_special_tokens=False)
        prompt_ids = {index: encoding.ids for index, encoding in zip(with_prompt, prompts, strict=True)}
        found = []
        for index, (rendered, encoding) in enumerate(zip(batch, encodings, strict=True)):
            ids = encoding.ids
            given = prompt_ids.get(index, [])
            offsets = np.array(encoding.offsets, np.int64).reshape(-1, 2)
            found.append(self._encoded(rendered, ids, offsets, is_prefix=ids[: len(given)] == given))
        return found

    def encode_prompt(self, text: str, *, is_complete: bool) -> list[int]:
        """Return the tokens of a text that the model continues: the first ones of what `encode` makes of the full text.

        `is_complete`: a template made the text, and has written BOS if there should be one.
        """
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [*self._missing_bos(ids, is_complete=is_complete), *ids]

    def _missing_bos(self, ids: list[int], *, is_complete: bool) -> list[int]:
        is_missing = self._adds_bos and not is_complete and ids[:1] != [self.bos_id]
        return [self.bos_id] if is_missing and self.bos_id is not None else []

    def _encoded(self, rendered: Rendered, ids: list[int], offsets: NDArray[np.int64], *, is_prefix: bool) -> Encoded:
        edges = np.array(rendered.spans, np.int64).reshape(-1)  # begin, end, begin, end …: ascending
        supervised = np.searchsorted(edges, offsets[:, 0], side="right") % 2 == 1
        at_begin = np.searchsorted(offsets[:, 0], edges[::2], side="right") - 1
        splits = bool(ids) and bool(((offsets[at_begin, 0] < edges[::2]) & (edges[::2] < offsets[at_begin, 1])).any())
        before = self._missing_bos(ids, is_complete=rendered.is_complete)
        has_end = ids[-1:] == [self.eos_id] or self.template.ends_in_control_token(rendered.text.rstrip())
        after = [] if has_end else [self.eos_id]
        mask = np.concatenate([np.zeros(len(before), np.bool_), supervised, np.ones(len(after), np.bool_)])
        mask[:1] = False
        return Encoded(np.array([*before, *ids, *after], np.int32), mask, is_prefix, splits)
