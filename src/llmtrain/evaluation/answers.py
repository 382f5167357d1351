"""Lets a model answer questions and measures its loss on the expected answers: in batches, on all processes.

    questions ─ this process's share, by length ─ batch ─ generate, loss ─▶ a line each in the journal ─▶ all answers

The journal is on disk. Questions whose answers it has are not asked again.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from llmtrain.atomic import append_lines
from llmtrain.config.sections.evaluation import EvaluationConfig
from llmtrain.data.chat.unused import Unused, add_unused, unused_line
from llmtrain.data.files.row_faults import RowError, RowFault, RowFaults
from llmtrain.distributed.engine import Engine
from llmtrain.errors import ConfigError
from llmtrain.evaluation.questions import Question, RenderedQuestion, render_question
from llmtrain.evaluation.row_loss import RowLoss, row_losses
from llmtrain.generation.decoding import Prompt, context_length, generate
from llmtrain.generation.language_model import LanguageModel
from llmtrain.generation.sampling import Decoding, Sampling

log = logging.getLogger("llmtrain.eval")

TOO_LONG = "prompt too long"
BATCHES_AT_A_TIME = 8
"""Number of batches that are generated and written together. Among them, rows that end are replaced by others."""


@dataclass(frozen=True, kw_only=True)
class AnswerSettings:
    """Settings for answering questions."""

    decoding: Decoding
    end_of_turn: str
    """Text of the control token that ends an answer, besides the model's own end tokens."""
    with_loss: bool = True
    """True if the loss on the expected answers is measured as well."""

    @staticmethod
    def of(settings: EvaluationConfig, *, seed: int, end_of_turn: str, with_loss: bool = True) -> AnswerSettings:
        """Return the settings from those of a config."""
        decoding = Decoding(
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed),
            batch_size=settings.batch_size,
        )
        return AnswerSettings(decoding=decoding, end_of_turn=end_of_turn, with_loss=with_loss)


class Answer(NamedTuple):
    """Text that a model wrote, and the loss of the expected answer."""

    prediction: str
    tokens: int
    ended_by: str
    """end, length (of max_new_tokens or the context), or: prompt too long."""
    loss_sum: float
    """Sum of the loss over the tokens of the expected answer, in nats."""
    loss_tokens: int
    """0 if the question and the expected answer are too long for the context."""


class AnswerJournal:
    """Keeps answers on disk, a line each. It reads those of all earlier processes, and writes those of this one."""

    def __init__(self, folder: Path, name: str, *, rank: int) -> None:
        self._file = folder / f"{name}.part-{rank}.jsonl"
        self.known: dict[str, Answer] = {}
        for file in sorted(folder.glob(f"{name}.part-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    key, *values = json.loads(line)
                    self.known[str(key)] = Answer(*values)
                except (ValueError, TypeError):  # cut off in the middle of the line, or of a character
                    continue

    def append(self, answers: Mapping[str, Answer]) -> None:
        """Write answers at once, so that a process that is killed loses no finished batch."""
        append_lines(self._file, (json.dumps([key, *answer], ensure_ascii=False) for key, answer in answers.items()))


def render_questions(
    questions: Sequence[Question], model: LanguageModel, *, chat: bool | None
) -> list[RenderedQuestion]:
    """Render each question for the model. Raises ConfigError with every row that its chat template rejects."""
    if model.encoder is None:
        raise ConfigError(f"{model.folder} has no tokenizer, so it cannot answer questions")
    faults, rendered = RowFaults(), []
    unused: dict[str, Unused] = {}
    for question in questions:
        try:
            rendered.append(
                render_question(question, model.encoder.template, chat=model.chats if chat is None else chat)
            )
            add_unused(unused, {name: Unused(1, question.source) for name in rendered[-1].unused})
        except RowError as error:
            faults.add(RowFault(question.source, str(error)))
    faults.raise_if_any("Correct these rows, or give the prompts as plain text: evaluation.chat=false.")
    if warning := unused_line(unused):
        log.warning("evaluation.data: %s", warning)
    return rendered


def answer_all(
    language_model: LanguageModel,
    rendered: Sequence[RenderedQuestion],
    how: AnswerSettings,
    *,
    engine: Engine,
    journal: AnswerJournal | None = None,
    before_batch: Callable[[], None] = lambda: None,
    after_row: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """Return an answer to each question, in their order, on every rank.

    The answers do not depend on the batches or the number of ranks. Ranks share the questions; if the model is sharded,
    all ranks answer each question together. The answer to a prompt that fills the context is empty. `before_batch` is
    called equally often on every rank; `after_row` is called with the number of this rank's questions that are done.
    """
    keys = unique_keys(rendered)
    known = journal.known if journal else {}
    prompts = [language_model.prompt_ids(one.text, is_complete=one.is_complete) for one in rendered]
    by_length = sorted(range(len(rendered)), key=lambda row: len(prompts[row]), reverse=True)
    shares, ours = (1, 0) if engine.is_sharded else (engine.world_size, engine.rank)
    share = by_length[ours::shares]
    open_rows = [row for row in share if keys[row] not in known]
    found = {row: known[keys[row]] for row in share if keys[row] in known}
    writer = _Writer(language_model, how)
    at_a_time = (how.decoding.batch_size or 1) * BATCHES_AT_A_TIME
    for begin in range(0, -(-len(rendered) // shares), at_a_time):
        before_batch()
        rows = open_rows[begin : begin + at_a_time]
        if not rows:
            continue
        ended = count(len(found) + 1)
        with language_model.computing():
            answers = writer.answers(
                [rendered[row] for row in rows],
                [prompts[row] for row in rows],
                [keys[row] for row in rows],
                on_end=lambda _, ended=ended: after_row(next(ended)),  # type: ignore[misc]
            )
        found |= dict(zip(rows, answers, strict=True))
        if journal is not None:
            journal.append({keys[row]: found[row] for row in rows})
        engine.watchdog.beat()
    parts = [found] if engine.is_sharded else engine.gather(found)
    return [answer for _, answer in sorted(pair for part in parts for pair in part.items())]


def unique_keys(rendered: Sequence[RenderedQuestion]) -> list[str]:
    """Return a key for each question, from its content. Equal questions get different keys."""
    counts: Counter[str] = Counter()
    keys = []
    for one in rendered:
        keys.append(f"{one.key}-{counts[one.key]}")
        counts[one.key] += 1
    return keys


class _Writer:
    def __init__(self, language_model: LanguageModel, how: AnswerSettings) -> None:
        if language_model.tokenizer is None or language_model.encoder is None:
            raise ConfigError(f"{language_model.folder} has no tokenizer, so it cannot answer questions")
        self._model, self._tokenizer = language_model.model, language_model.tokenizer
        self._encoder, self._decoding, self._with_loss = language_model.encoder, how.decoding, how.with_loss
        end = self._tokenizer.token_id(how.end_of_turn) if how.end_of_turn else None
        self._stop_ids = language_model.eos_ids if end is None else language_model.eos_ids | {end}
        self._limit = context_length(language_model.model)

    def answers(
        self,
        rendered: Sequence[RenderedQuestion],
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        *,
        on_end: Callable[[int], None],
    ) -> list[Answer]:
        """Return the answers to some questions, from their tokens `prompts` and the keys of their random numbers."""
        fits = [len(prompt) < self._limit for prompt in prompts]
        generated = iter(
            generate(
                self._model,
                [Prompt(prompt, draw_key=key) for prompt, key, fit in zip(prompts, keys, fits, strict=True) if fit],
                self._decoding,
                stop_ids=self._stop_ids,
                on_end=on_end,
            )
        )
        full = self._encoder.encode([one.with_answer for one in rendered]) if self._with_loss else []
        # A row that does not fit into the context gets no loss, since it would be that of a part.
        rows = [
            (one.input_ids.tolist(), one.supervised.tolist()) if len(one.input_ids) <= self._limit else ((), ())
            for one in full
        ]
        losses = row_losses(self._model, rows) if self._with_loss else [RowLoss(0.0, 0)] * len(prompts)
        answers = []
        for prompt, fit, loss in zip(prompts, fits, losses, strict=True):
            tokens = next(generated) if fit else []
            room = min(self._decoding.max_new_tokens, self._limit - len(prompt))
            ended = TOO_LONG if not fit else "length" if len(tokens) == room else "end"
            answers.append(Answer(self._tokenizer.decode(tokens), len(tokens), ended, loss.loss_sum, loss.num_tokens))
        return answers
