"""A sample as text again, to be looked at: which parts are learned, and which are control tokens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from itertools import groupby
from typing import Any, NamedTuple

from llmtrain.data.chat.sample import Sample
from llmtrain.screen import counted

SHOWN_TOKENS = 400
"""Tokens that are shown of a longer sample, from its beginning and its end."""


class SamplePiece(NamedTuple):
    """Neighbouring tokens of one kind."""

    text: str
    supervised: bool
    control: bool
    """A control token, such as `<|im_end|>`, and not its letters."""


def pieces_of(sample: Sample, tokenizer: Any) -> list[SamplePiece]:
    """Return the sample in pieces; their texts together are the text of the tokens. `tokenizer` is of transformers.

    Of many tokens those in the middle are left out; a piece between the others says so.
    """
    control = set(tokenizer.all_special_ids)
    control |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}

    def decode(ids: Sequence[int]) -> str:
        return str(tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=False))

    ids, supervised = sample.input_ids.tolist(), sample.supervised.tolist()
    if len(ids) <= SHOWN_TOKENS:
        return _pieces(ids, supervised, control, decode)
    head, tail = SHOWN_TOKENS * 3 // 4, len(ids) - SHOWN_TOKENS // 4
    return [
        *_pieces(ids[:head], supervised[:head], control, decode),
        SamplePiece(f"\n[… {counted(tail - head, 'token')} …]\n", supervised=False, control=False),
        *_pieces(ids[tail:], supervised[tail:], control, decode),
    ]


def _pieces(
    ids: Sequence[int], supervised: Sequence[bool], control: Collection[int], decode: Callable[[Sequence[int]], str]
) -> list[SamplePiece]:
    """Return what each run of tokens adds to the text before it.

    Some vocabularies write a blank only after other text. A character that is several tokens belongs to the last one.
    """
    pieces, end, before = [], 0, ""
    for (is_learned, is_control), run in groupby(
        zip(ids, supervised, strict=True), lambda pair: (pair[1], pair[0] in control)
    ):
        end += len(list(run))
        text = decode(ids[:end])
        whole = text.rstrip("\ufffd") if end < len(ids) else text
        pieces.append(SamplePiece(whole[len(before) :], supervised=is_learned, control=is_control))
        before = whole
    return pieces
