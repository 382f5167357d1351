"""`prepare.steps`: the quality steps that documents pass, in their order, before they are tokenised."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal

from pydantic import Field, model_validator

from llmtrain.config.sections.base import IMPORT_PATTERN, Section, key, opt

MAX_STEPS: Final = 32

GopherRule = Literal[
    "too_few_words",
    "too_many_words",
    "mean_word_length",
    "symbols",
    "bullet_lines",
    "ellipsis_lines",
    "words_without_letters",
    "stop_words",
    "duplicate_lines",
    "duplicate_line_characters",
    "duplicate_paragraphs",
    "duplicate_paragraph_characters",
    "top_ngrams",
    "duplicate_ngrams",
]
C4Rule = Literal[
    "terminal_punctuation",
    "short_lines",
    "javascript",
    "policy_notices",
    "citations",
    "lorem_ipsum",
    "curly_brackets",
    "few_sentences",
]


class ExactDuplicatesStep(Section):
    """Leaves out documents whose text came before."""

    name: Literal["exact_duplicates"] = opt("exact_duplicates", "The same text, byte for byte.")


class NearDuplicatesStep(Section):
    """Leaves out documents that share most word n-grams with an earlier one (MinHash). Needs the extra quality."""

    name: Literal["near_duplicates"] = opt("near_duplicates", "Nearly the same text.")
    threshold: float = opt(
        0.8, "Estimated Jaccard similarity of the sets of n-grams from which on it is a duplicate.", ge=0.4, le=1
    )
    ngram: int = opt(5, "Words in one n-gram.", ge=1)


class LengthStep(Section):
    """Leaves out documents that are too short or too long."""

    name: Literal["length"] = opt("length", "The number of characters.")
    min_chars: int = opt(1, "Fewest characters.", ge=0)
    max_chars: int | None = opt(None, "Most characters; any number when not given.", ge=1)

    @model_validator(mode="after")
    def _is_a_range(self) -> LengthStep:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"min_chars is {self.min_chars}, more than max_chars, {self.max_chars}")
        return self


class LanguageStep(Section):
    """Keeps documents in some languages, as py3langid identifies them. Needs the extra quality."""

    name: Literal["language"] = opt("language", "The language of the text.")
    keep: list[str] = key("Languages to keep, by their ISO 639 codes, such as en, de.", min_length=1)
    min_confidence: float = opt(0.65, "Documents whose language is less certain are left out.", ge=0, le=1)


class GopherStep(Section):
    """Leaves out documents by the quality and repetition rules of Gopher (Rae et al. 2021)."""

    name: Literal["gopher"] = opt("gopher", "Length and shape of words and lines, repetition, English stop words.")
    skip: list[GopherRule] = opt([], "Rules that are not applied, such as stop_words for text that is not English.")


class C4Step(Section):
    """Removes lines, and leaves out documents, by the rules of C4 (Raffel et al. 2020)."""

    name: Literal["c4"] = opt("c4", "Lines that are no sentences, code, boilerplate.")
    skip: list[C4Rule] = opt([], "Rules that are not applied.")


class MaskPiiStep(Section):
    """Replaces e-mail addresses and public IP addresses."""

    name: Literal["mask_pii"] = opt("mask_pii", "Personal data.")
    email: str | None = opt("<email>", "Text in place of an e-mail address; null leaves addresses as they are.")
    ip: str | None = opt("<ip>", "Text in place of a public IPv4 or IPv6 address; null leaves addresses as they are.")

    @model_validator(mode="after")
    def _masks_are_masked(self) -> MaskPiiStep:
        for name, mask in (("email", self.email), ("ip", self.ip)):
            if mask is not None and not re.fullmatch(r"<\w+>|\[\w+\]|\(\w+\)", mask):
                raise ValueError(f"{name} is {mask!r}, and has to be a word in brackets, such as <{name}>")
        return self


class OwnStep(Section):
    """A function of your own, `text → text`, or None to leave the document out."""

    name: Literal["own"] = opt("own", "A function of your own.")
    function: str = key("Its import path, my_package.module:function.", pattern=IMPORT_PATTERN)


QualityStep = Annotated[
    ExactDuplicatesStep | NearDuplicatesStep | LengthStep | LanguageStep | GopherStep | C4Step | MaskPiiStep | OwnStep,
    Field(discriminator="name"),
]
