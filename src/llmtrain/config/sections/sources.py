"""Training sources: paths, with weights or without."""

from __future__ import annotations

from collections.abc import Sequence

from llmtrain.config.sections.base import Section, key
from llmtrain.local_paths import ADDRESS


class WeightedSource(Section):
    path: str = key("A folder, file or glob, as in a list without weights.", json_schema_extra=ADDRESS)
    weight: float = key("Share of the sequences that come from here, relative to the other weights.", gt=0)


Source = str | WeightedSource


def check_sources(train: str | Sequence[Source]) -> None:
    """Raise ValueError for an empty list, or one where some sources have a weight and some have none."""
    if isinstance(train, str):
        return
    if not train:
        raise ValueError("train is an empty list")
    if len({isinstance(source, WeightedSource) for source in train}) == 2:
        raise ValueError("some of train's sources have a weight and some have none: give all or none a weight")
