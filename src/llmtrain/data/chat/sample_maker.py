"""Rows -> samples: shaped, rendered, tokenised, truncated; what was cut off or left out is counted.

    Row ─ example_of ─→ Example ─ cover ─→ Rendered … ─ encode ─→ Encoded … ─ fit ─→ Sample …

What is wrong with a row goes to `RowFaults`, and the rows after it are read, so that all faults are found in one pass.
Several processes share the work where rows are many: each reads all rows, which is cheap beside the rest, and makes the
samples of its share.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.data.chat.coverage import cover
from llmtrain.data.chat.encoding import ChatEncoder, Encoded
from llmtrain.data.chat.holdout import prompt_hash
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.shapes import Chat, Example, example_of
from llmtrain.data.chat.supervision import Rendered
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate
from llmtrain.data.files.read import Row
from llmtrain.data.files.row_faults import RowError, RowFault, RowFaults
from llmtrain.data.loader import read_ahead
from llmtrain.errors import ConfigError
from llmtrain.screen import counted

_BATCH_ROWS = 256
"""Rows that are tokenised in one call; processes take turns at batches of this size."""
_NO_END = 2**62

OpenRows = Callable[[], Iterator[Row | RowFault]]
"""Returns the rows from the first one on; it is sent to processes, where there are any."""
Select = Callable[[Example], bool]
"""Decides by its content whether a row is wanted."""
OnPrompt = Callable[[bytes | None, str], None]
"""Called with the `prompt_hash` and the place of each row that has a shape and is wanted."""


class Made(NamedTuple):
    """The samples of a batch of rows, and what happened to the others. Few arrays, so that it is cheap to send."""

    input_ids: NDArray[np.int32]
    """[n] of all samples, one after the other."""
    supervised: NDArray[np.bool_]
    """[n]"""
    lengths: list[int]
    """Number of tokens of each sample."""
    sources: list[str]
    """`file:line` of each sample."""
    tally: Tally
    faults: list[RowFault]
    prompts: list[tuple[bytes | None, str]]
    """Empty where they are not asked for."""

    def samples(self) -> Iterator[Sample]:
        """Yield the samples, as views."""
        begin = 0
        for length, source in zip(self.lengths, self.sources, strict=True):
            end = begin + length
            yield Sample(self.input_ids[begin:end], self.supervised[begin:end], source)
            begin = end


@dataclass(frozen=True)
class SampleMaker:
    """Makes samples of rows: none for a row with a fault, several where the template needs it.

    Every sample has 2 to `config.seq_len` tokens, and at least one that is supervised and not the first. Rows that
    `select` does not want are not counted either.
    """

    template: ChatTemplate
    config: ChatConfig
    select: Select | None = None
    wants_prompts: bool = False
    """True if `Made.prompts` is filled."""

    @cached_property
    def _encoder(self) -> ChatEncoder:
        return ChatEncoder(self.template)

    def make(self, rows: Sequence[Row | RowFault]) -> Made:
        """Make the samples of a batch. Raises ConfigError where the tokenizer or template does not allow it."""
        tally = Tally()
        faults: list[RowFault] = []
        prompts: list[tuple[bytes | None, str]] = []
        outcomes = [self._texts_of(row, tally, prompts) for row in rows]
        texts = [text for outcome in outcomes if not isinstance(outcome, RowFault) for text in outcome]
        encoded = iter(self._encoder.encode(texts))
        samples: list[Sample] = []
        for row, outcome in zip(rows, outcomes, strict=True):
            if not outcome:
                continue  # not selected
            tally.rows += 1
            if isinstance(outcome, RowFault):
                faults.append(outcome)
                continue
            try:
                mine = list(itertools.islice(encoded, len(outcome)))
                samples += _fit(mine, row.source, self._encoder, self.config, tally)
            except RowError as error:
                faults.append(RowFault(row.source, str(error)))
        for sample in samples:
            tally.count_sample(sample)
        return Made(
            np.concatenate([np.empty(0, np.int32), *(sample.input_ids for sample in samples)]),
            np.concatenate([np.empty(0, np.bool_), *(sample.supervised for sample in samples)]),
            [len(sample.input_ids) for sample in samples],
            [sample.source for sample in samples],
            tally,
            faults,
            prompts,
        )

    def _texts_of(
        self, row: Row | RowFault, tally: Tally, prompts: list[tuple[bytes | None, str]]
    ) -> list[Rendered] | RowFault:
        if isinstance(row, RowFault):
            return row
        template = self.template
        try:
            example = example_of(row.values, text_column=self.config.text_column)
            if self.select is not None and not self.select(example):
                return []
            if self.wants_prompts:
                prompts.append((prompt_hash(example), row.source))
            texts, unused = cover(example, template=template, supervise=self.config.supervise)
        except RowError as error:
            return RowFault(row.source, str(error))
        token = _control_token(example, template)
        tally.count_row(example.shape, row.source, num_texts=len(texts), control_token=token)
        tally.count_unused(unused, row.source)
        return texts


def samples_of(
    open_rows: OpenRows,
    maker: SampleMaker,
    *,
    tally: Tally,
    faults: RowFaults,
    on_prompt: OnPrompt | None = None,
    num_workers: int = 0,
) -> Iterator[Sample]:
    """Yield the samples of the rows, in their order, whatever `num_workers` is.

    As samples are taken, `tally` and `faults` are filled, and `on_prompt` is called. `num_workers` processes make them;
    `open_rows` and `maker` have to be picklable then. Raises what `SampleMaker.make` does, and RunError when a process
    dies.
    """
    open_ = partial(_open_batches, open_rows, maker, in_process=num_workers > 0)
    with closing(_batches(open_, num_workers=num_workers)) as batches:
        for made in batches:
            tally.add(made.tally)
            for fault in made.faults:
                faults.add(fault)
            if on_prompt is not None:
                for prompt, source in made.prompts:
                    on_prompt(prompt, source)
            yield from made.samples()


def conclude(tally: Tally, faults: RowFaults, *, key: str, config: ChatConfig) -> None:
    """Raise ConfigError if a run cannot have these rows. Call it after the last of them."""
    if config.on_error == "fail":
        faults.raise_if_any("Correct these rows, or leave them out by data.on_error: skip.")
    if not tally.samples:
        raise ConfigError(none_left(tally, key=key))


def none_left(tally: Tally, *, key: str) -> str:
    """Return the message for a part of the rows without a sample."""
    validate = "validate on: set data.val_fraction to 0, or name others in data.val"
    use = "train on" if key == "data.train" else validate
    return f"{key}: of {counted(tally.rows, 'row')} none is left to {use}"


def _batches(open_: Callable[[], Callable[[int], Made | None]], *, num_workers: int) -> Generator[Made, None, None]:
    """Yield what became of each batch of rows; without processes it is made here, when it is taken."""
    if num_workers == 0:
        batch_of, number = open_(), 0
        while (made := batch_of(number)) is not None:
            yield made
            number += 1
        return
    with closing(read_ahead(open_, num_steps=_NO_END, num_workers=num_workers)) as batches:
        for made in batches:
            if made is None:
                return
            yield made


def _open_batches(open_rows: OpenRows, maker: SampleMaker, *, in_process: bool) -> Callable[[int], Made | None]:
    """Return the function from a batch's number, which only rises, to what became of its rows; None after the last."""
    if in_process:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads would be as many again for each process
    rows = open_rows()
    begun = 0

    def batch(number: int) -> Made | None:
        nonlocal begun
        while begun < number:
            next(itertools.islice(rows, _BATCH_ROWS - 1, None), None)
            begun += 1
        begun += 1
        taken = list(itertools.islice(rows, _BATCH_ROWS))
        return maker.make(taken) if taken else None

    return batch


def _control_token(example: Example, template: ChatTemplate) -> str | None:
    """Return a control token that somebody wrote into a turn, where only the template should write them."""
    if not isinstance(example, Chat):
        return None
    found = (template.first_control_token(message["content"]) for message in example.messages)
    return next((token for token in found if token), None)


def _fit(texts: list[Encoded], source: str, encoder: ChatEncoder, config: ChatConfig, tally: Tally) -> list[Sample]:
    """Truncate a row's samples to `seq_len`. Raises RowError when the row cannot be learned from as it is."""
    for text in texts:
        _check(text, encoder, config)
    tally.lengths.update(len(text.input_ids) for text in texts)
    if config.truncation == "drop":
        fitting = [text for text in texts if len(text.input_ids) <= config.seq_len]
        if not fitting:
            tally.count_drop(source)
            return []
        tally.turns_left_out += len(texts) - len(fitting)
        texts = fitting
    all_samples = [_truncated(text, source, encoder, config) for text in texts]
    samples = [sample for sample in all_samples if sample.supervised.any()]
    if not samples:
        raise RowError(_nothing_left(texts, config))
    tally.turns_left_out += len(texts) - len(samples)
    if any(text.splits_token for text in texts):
        tally.count_split_token(source)
    tokens = sum(len(text.input_ids) for text in texts) - sum(len(sample.input_ids) for sample in all_samples)
    if tokens:
        before, after = (sum(int(one.supervised.sum()) for one in some) for some in (texts, all_samples))
        tally.count_cut(source, tokens=tokens, supervised_tokens=before - after)
    return samples


def _check(text: Encoded, encoder: ChatEncoder, config: ChatConfig) -> None:
    if not text.prompt_is_prefix:
        raise RowError(
            "the prompt's tokens are not the first ones of prompt and completion together, so the model would be asked "
            "with other tokens than it learned: end the prompt without a blank, and begin the completion with it"
        )
    if encoder.bos_id is not None and text.input_ids[:2].tolist() == [encoder.bos_id] * 2:
        raise RowError("begins with two BOS tokens: take the one out of the row, or out of the chat template")
    if config.truncation == "error" and len(text.input_ids) > config.seq_len:
        raise RowError(
            f"has {counted(len(text.input_ids), 'token')}, more than data.seq_len {config.seq_len:,}: raise it, or let "
            "data.truncation be right, left or drop"
        )


def _truncated(text: Encoded, source: str, encoder: ChatEncoder, config: ChatConfig) -> Sample:
    ids, supervised = text.input_ids, text.supervised
    over = len(ids) - config.seq_len
    if over > 0 and config.truncation == "left":
        keeps_bos = ids[0] == encoder.bos_id
        kept = np.r_[0, over + 1 : len(ids)] if keeps_bos else np.arange(over, len(ids))
        ids, supervised = ids[kept], supervised[kept]
        supervised[0] = False
    elif over > 0:
        ids, supervised = ids[: config.seq_len], supervised[: config.seq_len]
    return Sample(ids, supervised, source)


def _nothing_left(texts: Sequence[Encoded], config: ChatConfig) -> str:
    longest = max(len(text.input_ids) for text in texts)
    supervised = sum(int(text.supervised.sum()) for text in texts)
    if not supervised:
        return "has no supervised token: nothing would be learned from it"
    side = "last" if config.truncation == "left" else "first"
    return (
        f"none of its {supervised:,} supervised tokens is among the {side} {config.seq_len:,} of {longest:,}: raise "
        "data.seq_len, or let data.truncation be " + ("drop" if side == "last" else "left or drop")
    )
