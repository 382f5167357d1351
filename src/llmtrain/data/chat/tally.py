"""Count what became of the rows, with the first row of each kind, for the lines that a run prints before it starts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import NamedTuple

from llmtrain.data.chat.sample import Sample
from llmtrain.data.chat.unused import Unused, add_unused
from llmtrain.screen import counted


class ControlToken(NamedTuple):
    """A control token in what somebody wrote."""

    source: str
    token: str


@dataclass
class Tally:
    """Counts of rows, samples and tokens. Rows with faults are in `rows` alone."""

    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    """Rows without a fault, by shape."""
    lengths: Counter[int] = field(default_factory=Counter)
    """Tokens of the texts of rows without a fault, before anything is cut or left out -> how many have as many."""
    samples: int = 0
    tokens: int = 0
    """Number of tokens of the samples, as they are trained on."""
    supervised_tokens: int = 0

    rows_cut: int = 0
    tokens_cut: int = 0
    supervised_tokens_cut: int = 0
    first_cut: str | None = None
    turns_left_out: int = 0
    """Number of one-answer samples that were left out because the answer lies beyond the cut, or is too long."""

    rows_dropped: int = 0
    first_dropped: str | None = None

    rows_by_turn: int = 0
    """Rows that became a sample for each answer, since the template cannot show all answers at once."""
    samples_by_turn: int = 0
    first_by_turn: str | None = None

    rows_with_split_tokens: int = 0
    """Rows where a token holds the end of a header and the beginning of an answer, and is not learned."""
    first_split_token: str | None = None

    unused: dict[str, Unused] = field(default_factory=dict)
    """Values of rows that neither their texts show nor anything else uses, by name."""

    rows_with_control_tokens: int = 0
    first_control_token: ControlToken | None = None

    def count_row(self, shape: str, source: str, *, num_texts: int, control_token: str | None) -> None:
        """Count a row that has a shape and was rendered."""
        self.shapes[shape] += 1
        if num_texts > 1:
            self.rows_by_turn += 1
            self.samples_by_turn += num_texts
            self.first_by_turn = self.first_by_turn or source
        if control_token is not None:
            self.rows_with_control_tokens += 1
            self.first_control_token = self.first_control_token or ControlToken(source, control_token)

    def count_sample(self, sample: Sample) -> None:
        """Count a sample that is trained on."""
        self.samples += 1
        self.tokens += len(sample.input_ids)
        self.supervised_tokens += int(sample.supervised.sum())

    def count_drop(self, source: str) -> None:
        """Count a row that is left out for its length."""
        self.rows_dropped += 1
        self.first_dropped = self.first_dropped or source

    def count_cut(self, source: str, *, tokens: int, supervised_tokens: int) -> None:
        """Count a row that was cut."""
        self.rows_cut += 1
        self.tokens_cut += tokens
        self.supervised_tokens_cut += supervised_tokens
        self.first_cut = self.first_cut or source

    def count_unused(self, names: Iterable[str], source: str) -> None:
        """Count a row that holds what is not used."""
        add_unused(self.unused, {name: Unused(1, source) for name in names})

    def count_split_token(self, source: str) -> None:
        """Count a row with a token that the template's header and an answer share."""
        self.rows_with_split_tokens += 1
        self.first_split_token = self.first_split_token or source

    def add(self, later: Tally) -> None:
        """Count in what was counted of rows that come after those counted so far."""
        for one in fields(self):
            mine, theirs = getattr(self, one.name), getattr(later, one.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, dict):
                add_unused(mine, theirs)
            elif isinstance(mine, int):
                setattr(self, one.name, mine + theirs)
            elif mine is None:
                setattr(self, one.name, theirs)

    def lines(self, *, seq_len: int, truncation: str) -> list[str]:
        """Return what to print before training: a sentence for each thing that happened."""
        shapes = ", ".join(f"{shape} {count:,}" for shape, count in self.shapes.most_common())
        share = self.supervised_tokens / max(1, self.tokens)
        lines = [
            f"{counted(self.rows, 'row')} ({shapes}): {counted(self.samples, 'sample')} of "
            f"{counted(self.tokens, 'token')}, {share:.1%} of them supervised"
        ]
        if self.rows_cut:
            side = "the beginning is" if truncation == "left" else "the end is"
            lines.append(
                f"{counted(self.rows_cut, 'row has', 'rows have')} more than {counted(seq_len, 'token')}: {side} "
                f"cut off ({counted(self.tokens_cut, 'token')}, {self.supervised_tokens_cut:,} of them supervised; "
                f"the first is {self.first_cut}); raise data.seq_len to keep them, or change data.truncation"
            )
        if self.turns_left_out:
            answers = counted(self.turns_left_out, "answer beyond", "answers beyond")
            lines.append(f"{answers} {counted(seq_len, 'token')} left out")
        if self.rows_dropped:
            lines.append(
                f"{counted(self.rows_dropped, 'row has', 'rows have')} more than {counted(seq_len, 'token')}, and "
                f"left out (data.truncation: drop; the first is {self.first_dropped}); raise data.seq_len to keep them"
            )
        if self.rows_by_turn:
            lines.append(
                "the chat template shows turns differently once others follow: "
                f"{counted(self.rows_by_turn, 'row becomes', 'rows become')} "
                f"{counted(self.samples_by_turn, 'sample')}, one for each answer (the first is {self.first_by_turn})"
            )
        if self.rows_with_split_tokens:
            lines.append(
                f"{counted(self.rows_with_split_tokens, 'row has', 'rows have')} answers whose first token begins "
                f"in the template's header, and is not learned (the first is {self.first_split_token}): "
                "let the header not end in a blank"
            )
        if self.first_control_token is not None:
            source, token = self.first_control_token
            lines.append(
                f"{counted(self.rows_with_control_tokens, 'row holds', 'rows hold')} control tokens in text, which "
                f"are read as such (the first is {source}, {token!r})"
            )
        return lines
