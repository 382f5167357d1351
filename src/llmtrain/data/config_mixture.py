"""The sources of a config: the groups of paths that are read together, and the mixture of these groups.

train: paths alone      ─▶ one group, no mixture
train: weights, epochs  ─▶ a group for each source that is used, and a MixtureSpec (mixture.py)
"""

from __future__ import annotations

from dataclasses import dataclass

from llmtrain.config.sections.chat import ChatConfig
from llmtrain.config.sections.data import TokensConfig
from llmtrain.config.sections.sources import MixedSource, MixtureConfig, StageConfig, is_used
from llmtrain.data.mixture import MixtureSpec, MixtureStage, block_quotas


@dataclass(frozen=True)
class SourceGroups:
    """Sources of a config, before anything is opened."""

    groups: list[list[str]]
    """Paths that are one source."""
    mixture: MixtureSpec | None
    """None: there is one group, without weights and limits."""


def source_groups(data: TokensConfig | ChatConfig) -> SourceGroups:
    """Return the sources of `data.train`, without those that are never used.

    Raises ConfigError where a weight alone is too small for its source to have an item in a block.
    """
    if isinstance(data.train, str):
        return SourceGroups([[data.train]], None)
    mixed = [source for source in data.train if isinstance(source, MixedSource)]
    if not mixed:
        return SourceGroups([[path for path in data.train if isinstance(path, str)]], None)
    used = [source for source, is_read in zip(mixed, is_used(data.train, data.mixture), strict=True) if is_read]
    mixture = data.mixture or MixtureConfig()
    weights = tuple(source.weight for source in used if source.weight is not None)
    limits = tuple(_limit(source, mixture) for source in used)
    spec = MixtureSpec(
        weights=weights or None,
        by=mixture.by,
        max_epochs=limits if any(limits) else (),
        at_limit=mixture.at_limit if any(limits) else "share",
        stages=tuple(_stage(stage, is_used(data.train, mixture)) for stage in mixture.stages),
        names=tuple(source.path for source in used),
    )
    if spec.has_weights_alone:
        block_quotas(weights)  # raises for a weight that is too small, before anything is opened
    return SourceGroups([[source.path] for source in used], spec)


def _limit(source: MixedSource, mixture: MixtureConfig) -> float | None:
    return source.epochs or source.max_epochs or mixture.max_epochs


def _stage(stage: StageConfig, used: list[bool]) -> MixtureStage:
    weights = tuple(weight for weight, is_read in zip(stage.weights, used, strict=True) if is_read)
    return MixtureStage(weights=weights, from_step=stage.from_step, from_fraction=stage.from_fraction)
