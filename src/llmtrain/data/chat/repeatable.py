"""Check that a chat template writes the same text for the same row, at any time and in any process."""

from __future__ import annotations

import logging
from itertools import pairwise

from jinja2 import Environment, TemplateSyntaxError

from llmtrain.errors import ConfigError

logger = logging.getLogger("llmtrain.data")

_CHANCE = {("|", "random"): "random", ("filter", "random"): "random", ("lipsum", "("): "lipsum"}
"""Random functions of Jinja, by the two words in which a template calls them."""


def check_repeatable(origin: str, *texts: str) -> None:
    """Raise ConfigError where a template draws at random; say that a template that writes today's date gets another."""
    pairs = {pair for text in texts for pair in pairwise(_words_of(text))}
    for pair, name in _CHANCE.items():
        if pair in pairs:
            raise ConfigError(
                f"{origin} draws at random (Jinja's {name!r}), so the same row would be another text each time: take "
                f"{name!r} out of it, and name the file in data.chat_template"
            )
    if any("strftime_now" in pair for pair in pairs):
        logger.info("%s writes today's date: 26 Jul 2024 stands in its place, so that a run can be repeated", origin)


def _words_of(text: str) -> list[str]:
    """Return the names and operators of a template, in their order."""
    try:
        return [word for _, kind, word in Environment().lex(text) if kind in ("name", "operator")]
    except TemplateSyntaxError:
        return []  # rendering says what is wrong with it
