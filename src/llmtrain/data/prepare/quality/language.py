"""The step `language`: py3langid's naive Bayes over byte n-grams (Lui and Baldwin 2012), whose model is in its package.

It knows 140 languages, is small (4.5 MB), needs only numpy, and its model is no pickle. The confidence is a probability
that py3langid keeps calibrated over lengths of text.
"""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

from llmtrain.config.sections.quality import LanguageStep
from llmtrain.data.prepare.quality.step import Dropped
from llmtrain.errors import ConfigError
from llmtrain.installing import install_extra

MAX_CHARS = 2000
"""The language is told from the beginning of a text: more takes longer and changes next to no answer."""


class Language:
    """Drops texts in other languages, and texts whose language is not certain enough.

    The usual threshold, 0.65, is FineWeb's (Penedo et al. 2024, arXiv 2406.17557, section 3.3).
    """

    version: ClassVar[int] = 1
    rules = ("other_language", "low_confidence")
    alters = False

    def __init__(self, options: LanguageStep, *, key: str) -> None:
        """Raises ConfigError, with the config's `key`, for a language that the model does not know."""
        try:
            from py3langid.langid import LanguageIdentifier
        except ImportError as error:
            raise ConfigError(f"{key}: language needs py3langid: `{install_extra('quality')}`") from error
        self._identifier = _identifier(LanguageIdentifier)
        known = set(self._identifier.labels)
        unknown = [code for code in options.keep if code not in known]
        if unknown:
            raise ConfigError(
                f"{key}.keep: the model knows no language {', '.join(unknown)}; it knows {', '.join(sorted(known))}"
            )
        self._keep = frozenset(options.keep)
        self._least = options.min_confidence

    def apply(self, text: str) -> str | Dropped:
        """Return the text if it is in one of the languages, certainly enough."""
        language, confidence = self._identifier.classify(text[:MAX_CHARS])
        if language not in self._keep:
            return Dropped("other_language")
        return text if confidence >= self._least else Dropped("low_confidence")


@cache
def _identifier(kind: Any) -> Any:
    """Return the one identifier of this process: it takes a second to load, and does not change in use."""
    from py3langid.langid import MODEL_FILE

    return kind.from_model_file(MODEL_FILE, norm_probs=True)
