"""A model's answers to questions, and its loss on the expected ones: in batches, shared among processes, kept on disk.

    questions ─ this process's share, by length ─ batch ─ generate, loss ─▶ a line each in the journal ─▶ all answers

What the journal has already is not asked again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import NamedTuple

from llmtrain.config.errors import ConfigError
from llmtrain.config.evaluation import EvaluationConfig
from llmtrain.data.chat.faults import Fault, Faults, RowError
from llmtrain.distributed.engine import Engine
from llmtrain.evaluation.generation import context_of, generate
from llmtrain.evaluation.questions import Asked, Question, ask
from llmtrain.evaluation.row_loss import RowLoss, row_losses
from llmtrain.evaluation.sampling import Sampling
from llmtrain.recipes.loading.language_model import LanguageModel

TOO_LONG = "prompt too long"
BATCHES_AT_A_TIME = 8
"""Whose answers are written down together: rows that end make place for others of these."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are written."""

    max_new_tokens: int
    sampling: Sampling
    batch_size: int

    @staticmethod
    def of(settings: EvaluationConfig, *, seed: int) -> Decoding:
        """As a config wants it."""
        return Decoding(
            max_new_tokens=settings.max_new_tokens,
            sampling=Sampling(temperature=settings.temperature, top_p=settings.top_p, seed=seed),
            batch_size=settings.batch_size,
        )


class Answer(NamedTuple):
    """What a model wrote, and what the expected answer costs it."""

    prediction: str
    tokens: int
    ended_by: str
    """end, length (of max_new_tokens or the context), or: prompt too long."""
    loss_sum: float
    """In nats."""
    loss_tokens: int
    """0 where the question and the expected answer are too long for the context."""


class Journal:
    """Answers on disk, a line each: written by this process, read of all processes that came before."""

    def __init__(self, folder: Path, name: str, *, rank: int) -> None:
        self._file = folder / f"{name}.part-{rank}.jsonl"
        self.known: dict[str, Answer] = {}
        for file in sorted(folder.glob(f"{name}.part-*.jsonl")):
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    key, *values = json.loads(line)
                    self.known[str(key)] = Answer(*values)
                except (ValueError, TypeError):  # cut off in the middle of the line
                    continue

    def append(self, answers: Mapping[str, Answer]) -> None:
        """Write them, so that a process that is killed has lost no finished batch."""
        with self._file.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps([key, *answer], ensure_ascii=False) + "\n" for key, answer in answers.items())


def ask_all(questions: Sequence[Question], model: LanguageModel, *, chat: bool | None) -> list[Asked]:
    """The questions as the model reads them. ConfigError with every row that its template does not take."""
    if model.encoder is None:
        raise ConfigError(f"{model.folder} has no tokenizer, so it cannot be asked anything")
    faults, asked = Faults(), []
    for question in questions:
        try:
            asked.append(ask(question, model.encoder.template, chat=model.chats if chat is None else chat))
        except RowError as error:
            faults.add(Fault(question.source, str(error)))
    faults.raise_if_any("Correct these rows, or ask in plain text: evaluation.chat=false.")
    return asked


def answer_all(
    language_model: LanguageModel,
    asked: Sequence[Asked],
    *,
    decoding: Decoding,
    end_of_turn: str,
    engine: Engine,
    journal: Journal | None = None,
    with_loss: bool = True,
    before_batch: Callable[[], None] = lambda: None,
    after_row: Callable[[int], None] = lambda _: None,
) -> list[Answer]:
    """An answer to each question, in their order, on every rank; the same for any batch size and number of ranks.

    `end_of_turn` is the text of the control token that ends an answer, besides the model's own end tokens.
    `before_batch` is called as often on every rank; `after_row` is told how many questions of this rank's are done. A
    prompt that leaves no room in the context is answered by nothing. Ranks share the questions; where the model is cut
    over them, all answer each one, batch by batch together.
    """
    keys = unique_keys(asked)
    known = journal.known if journal else {}
    prompts = [language_model.prompt_ids(one.text, is_complete=one.is_complete) for one in asked]
    by_length = sorted(range(len(asked)), key=lambda row: len(prompts[row]), reverse=True)
    shares, ours = (1, 0) if engine.cuts else (engine.world_size, engine.rank)
    share = by_length[ours::shares]
    open_rows = [row for row in share if keys[row] not in known]
    found = {row: known[keys[row]] for row in share if keys[row] in known}
    writer = _Writer(language_model, decoding, end_of_turn, with_loss=with_loss)
    at_a_time = decoding.batch_size * BATCHES_AT_A_TIME
    for begin in range(0, -(-len(asked) // shares), at_a_time):
        before_batch()
        rows = open_rows[begin : begin + at_a_time]
        if not rows:
            continue
        ended = count(len(found) + 1)
        answers = writer.answers(
            [asked[row] for row in rows],
            [prompts[row] for row in rows],
            [keys[row] for row in rows],
            on_end=lambda _, ended=ended: after_row(next(ended)),  # type: ignore[misc]
        )
        found |= dict(zip(rows, answers, strict=True))
        if journal is not None:
            journal.append({keys[row]: found[row] for row in rows})
        engine.watchdog.beat()
    parts = [found] if engine.cuts else engine.gather(found)
    return [answer for _, answer in sorted(pair for part in parts for pair in part.items())]


def unique_keys(asked: Sequence[Asked]) -> list[str]:
    """A key for each question, by what it says; the second of two equal ones has another."""
    counts: Counter[str] = Counter()
    keys = []
    for one in asked:
        keys.append(f"{one.key}-{counts[one.key]}")
        counts[one.key] += 1
    return keys


class _Writer:
    def __init__(self, language_model: LanguageModel, decoding: Decoding, end_of_turn: str, *, with_loss: bool) -> None:
        if language_model.tokenizer is None or language_model.encoder is None:
            raise ConfigError(f"{language_model.folder} has no tokenizer, so it cannot be asked anything")
        self._model, self._tokenizer = language_model.model, language_model.tokenizer
        self._encoder, self._decoding, self._with_loss = language_model.encoder, decoding, with_loss
        end = self._tokenizer.token_id(end_of_turn) if end_of_turn else None
        self._stop_ids = language_model.eos_ids if end is None else language_model.eos_ids | {end}
        self._limit = context_of(language_model.model)

    def answers(
        self,
        asked: Sequence[Asked],
        prompts: Sequence[Sequence[int]],
        keys: Sequence[str],
        *,
        on_end: Callable[[int], None],
    ) -> list[Answer]:
        """Of some questions."""
        fits = [len(prompt) < self._limit for prompt in prompts]
        generated = iter(
            generate(
                self._model,
                [prompt for prompt, fit in zip(prompts, fits, strict=True) if fit],
                max_new_tokens=self._decoding.max_new_tokens,
                sampling=self._decoding.sampling,
                stop_ids=self._stop_ids,
                batch_size=self._decoding.batch_size,
                on_end=on_end,
                draw_keys=[key for key, fit in zip(keys, fits, strict=True) if fit],
            )
        )
        whole = self._encoder.encode([one.whole for one in asked]) if self._with_loss else []
        # A row that the context does not hold would have the loss of a part of it: it has none.
        rows = [
            (one.input_ids.tolist(), one.supervised.tolist()) if len(one.input_ids) <= self._limit else ((), ())
            for one in whole
        ]
        losses = row_losses(self._model, rows) if self._with_loss else [RowLoss(0.0, 0)] * len(prompts)
        answers = []
        for prompt, fit, loss in zip(prompts, fits, losses, strict=True):
            tokens = next(generated) if fit else []
            room = min(self._decoding.max_new_tokens, self._limit - len(prompt))
            ended = TOO_LONG if not fit else "length" if len(tokens) == room else "end"
            answers.append(Answer(self._tokenizer.decode(tokens), len(tokens), ended, loss.loss_sum, loss.num_tokens))
        return answers
