"""Rows -> samples: shaped, rendered, tokenised, cut to length; what was cut or left out is counted.

    Row ─ example_of ─→ Example ─ render ─→ Rendered … ─ encode ─→ Encoded … ─ fit ─→ Sample …

What is wrong with a row goes to `Faults`, and the rows after it go on, so that all faults are found in one pass.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from llmtrain.config.chat import ChatConfig
from llmtrain.config.errors import ConfigError
from llmtrain.data.chat.encoding import ChatEncoder, Encoded
from llmtrain.data.chat.faults import Fault, Faults, RowError
from llmtrain.data.chat.rows import Row, read_rows
from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.shapes import Chat, Example, example_of
from llmtrain.data.chat.supervision import Rendered, render
from llmtrain.data.chat.tally import Tally
from llmtrain.data.chat.templates import ChatTemplate

logger = logging.getLogger(__name__)

_BATCH_ROWS = 256
"""Rows that are tokenised in one call, by all of the library's threads."""


Select = Callable[[Example, str], bool]
"""Whether a row is wanted, by what it says and its place."""


def load_samples(
    paths: str | Sequence[str], *, key: str, template: ChatTemplate, config: ChatConfig, select: Select | None = None
) -> tuple[list[Sample], Tally]:
    """The samples of the rows at `paths`, and what became of the rows. `key` is the config's, for messages.

    `select` is asked for each row without a fault; those that it does not want are not counted either. Says what was
    cut and left out. Raises ConfigError with all faults of the rows (unless `config.on_error` leaves these rows out),
    or when no row is left.
    """
    tally, faults = Tally(), Faults()
    split = "validation" if key.endswith("val") else "train"
    rows = read_rows(paths, key=key, default_split=split)
    samples = list(samples_of(rows, template=template, config=config, tally=tally, faults=faults, select=select))
    conclude(tally, faults, key=key, config=config)
    return samples, tally


def conclude(tally: Tally, faults: Faults, *, key: str, config: ChatConfig) -> None:
    """After the last row: say what happened to the rows, and raise ConfigError if a run cannot have them."""
    if config.on_error == "fail":
        faults.raise_if_any("Correct these rows, or leave them out by data.on_error: skip.")
    if faults.count:
        logger.warning("%s: %d rows are left out (data.on_error: skip):", key, faults.count)
        for line in faults.lines():
            logger.warning("  %s", line)
    for line in tally.lines(seq_len=config.seq_len, truncation=config.truncation):
        logger.info("%s: %s", key, line)
    if not tally.samples:
        raise ConfigError(f"{key}: of {tally.rows:,} rows none is left to train on")


def samples_of(
    rows: Iterable[Row | Fault],
    *,
    template: ChatTemplate,
    config: ChatConfig,
    tally: Tally,
    faults: Faults,
    select: Select | None = None,
) -> Iterator[Sample]:
    """The samples of `rows`, in their order: none for a row with a fault, several where the template needs it.

    Every sample has 2 to `config.seq_len` tokens, and at least one that is supervised and not the first. `tally` and
    `faults` are filled as samples are taken. Raises ConfigError where the tokenizer or template cannot do.
    """
    encoder = ChatEncoder(template)
    row_iterator = iter(rows)
    while batch := list(itertools.islice(row_iterator, _BATCH_ROWS)):
        outcomes = [_texts_of(row, template, config, tally, select) for row in batch]
        texts = [text for outcome in outcomes if not isinstance(outcome, Fault) for text in outcome]
        encoded = iter(encoder.encode(texts))
        for row, outcome in zip(batch, outcomes, strict=True):
            if not outcome:
                continue  # not selected
            tally.rows += 1
            if isinstance(outcome, Fault):
                faults.add(outcome)
                continue
            try:
                samples = _fit(list(itertools.islice(encoded, len(outcome))), row.source, encoder, config, tally)
            except RowError as error:
                faults.add(Fault(row.source, str(error)))
                continue
            for sample in samples:
                tally.count_sample(sample)
                yield sample


def _texts_of(
    row: Row | Fault, template: ChatTemplate, config: ChatConfig, tally: Tally, select: Select | None
) -> list[Rendered] | Fault:
    if isinstance(row, Fault):
        return row
    try:
        example = example_of(row.values, text_column=config.text_column)
        if select is not None and not select(example, row.source):
            return []
        texts = render(example, template=template, supervise=config.supervise)
    except RowError as error:
        return Fault(row.source, str(error))
    if isinstance(example, Chat) and _hides_turn(example, texts[-1].text):
        tally.count_hidden_turn(row.source)
    tally.count_row(example.shape, row.source, num_texts=len(texts), control_token=_control_token(example, template))
    return texts


def _hides_turn(chat: Chat, text: str) -> bool:
    """Whether a turn of the system or user up to the last answer is missing in what the template made of it all."""
    shown = chat.messages[: max(chat.supervised)]
    return any(turn["role"] in ("system", "user") and turn["content"].strip() not in text for turn in shown)


def _control_token(example: Example, template: ChatTemplate) -> str | None:
    """A control token that stands in what somebody wrote in a turn, where only the template should write them."""
    if not isinstance(example, Chat):
        return None
    found = (template.first_control_token(message["content"]) for message in example.messages)
    return next((token for token in found if token), None)


def _fit(texts: list[Encoded], source: str, encoder: ChatEncoder, config: ChatConfig, tally: Tally) -> list[Sample]:
    """A row's samples, cut to `seq_len`. Raises RowError when the row cannot be learned from as it is."""
    for text in texts:
        _check(text, encoder, config)
    if config.truncation == "drop":
        fitting = [text for text in texts if len(text.input_ids) <= config.seq_len]
        if not fitting:
            tally.count_drop(source)
            return []
        tally.turns_left_out += len(texts) - len(fitting)
        texts = fitting
    all_samples = [_cut(text, source, encoder, config) for text in texts]
    samples = [sample for sample in all_samples if sample.supervised.any()]
    if not samples:
        raise RowError(_nothing_left(texts, config))
    tally.turns_left_out += len(texts) - len(samples)
    if any(text.splits_token for text in texts):
        tally.count_split_token(source)
    tokens = sum(len(text.input_ids) for text in texts) - sum(len(sample.input_ids) for sample in all_samples)
    if tokens:
        learned = [sum(int(one.supervised.sum()) for one in some) for some in (texts, all_samples)]
        tally.count_cut(source, tokens=tokens, supervised_tokens=learned[0] - learned[1])
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
            f"has {len(text.input_ids):,} tokens, more than data.seq_len {config.seq_len:,}: raise it, or let "
            "data.truncation be right, left or drop"
        )


def _cut(text: Encoded, source: str, encoder: ChatEncoder, config: ChatConfig) -> Sample:
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
