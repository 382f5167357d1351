"""Training sources: paths alone, or a mixture of sources with weights or epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import model_validator

from llmtrain.config.sections.base import Alternatives, Section, key, opt
from llmtrain.local_paths import ADDRESS


class MixedSource(Section):
    """A source of a mixture, with a weight or a number of epochs."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (
        Alternatives(("weight", "epochs")),
        Alternatives(("epochs", "max_epochs")),
    )

    path: str = key("A folder, file or glob, as in a list without weights.", json_schema_extra=ADDRESS)
    weight: float | None = opt(
        None,
        "Share of this source, relative to the other weights; 0 leaves it out.",
        ge=0,
    )
    epochs: float | None = opt(
        None, "In place of a weight: use it exactly this many times. The run ends when all are done.", gt=0
    )
    max_epochs: float | None = opt(None, "Use it at most this many times; mixture.max_epochs when not given.", gt=0)

    @model_validator(mode="after")
    def _has_a_share(self) -> MixedSource:
        if self.weight is None and self.epochs is None:
            raise ValueError("give weight, the share of the source, or epochs, how often it is used")
        return self


Source = str | MixedSource


class StageConfig(Section):
    """A part of the run with other weights: from its begin to that of the next stage, or to the end."""

    alternatives: ClassVar[tuple[Alternatives, ...]] = (Alternatives(("from_step", "from_fraction")),)

    from_step: int | None = opt(None, "Optimizer steps before the stage.", ge=1)
    from_fraction: float | None = opt(None, "Share of the run's steps before the stage.", gt=0, lt=1)
    weights: list[float] = key("A weight for each of the sources; 0: it pauses.", min_length=1)

    @model_validator(mode="after")
    def _begins_and_has_weights(self) -> StageConfig:
        if self.from_step is None and self.from_fraction is None:
            raise ValueError("give from_step or from_fraction: where the stage begins")
        check_weights(self.weights, name="weights")
        return self


class MixtureConfig(Section):
    """Unit, limits and later stages of the weights of train's sources."""

    by: Literal["sequences", "tokens", "documents"] = opt(
        "sequences",
        "Unit in which weights are shares; a document is a row of data.name chat.",
    )
    max_epochs: float | None = opt(
        None, "Use each source at most this many times, unless it has a limit of its own.", gt=0
    )
    at_limit: Literal["share", "stop"] = opt(
        "share", "After the last use of a source: the others get its share, or the run ends."
    )
    stages: list[StageConfig] = opt([], "Later parts of the run with other weights, in their order.")


def check_sources(train: str | Sequence[Source], mixture: MixtureConfig | None = None) -> None:
    """Raise ValueError for an empty list, for sources that do not fit each other, and where `mixture` does not fit."""
    listed = [train] if isinstance(train, str) else train
    if not listed:
        raise ValueError("train is an empty list")
    mixed = [source for source in listed if isinstance(source, MixedSource)]
    if mixed and len(mixed) < len(listed):
        raise ValueError("some of train's sources have a weight and some have none: give all or none a weight")
    weights = [source.weight for source in mixed if source.weight is not None]
    if weights and len(weights) < len(mixed):
        raise ValueError(
            "some of train's sources have a weight and some have epochs: give all of them weights (max_epochs limits "
            "how often a source is used), or all of them epochs"
        )
    if mixture is not None and not weights:
        what = "epochs, which leave nothing to it" if mixed else "no weights"
        raise ValueError(f"mixture is for sources with weights, and those of train have {what}: remove mixture")
    if weights:
        check_weights(weights, name="the weights of train")
    for stage in mixture.stages if mixture else []:
        if len(stage.weights) != len(weights):
            raise ValueError(
                f"a stage of mixture has {len(stage.weights)} weights, but train has {len(weights)} sources: give one "
                "for each, in their order (0 pauses a source)"
            )


def check_weights(weights: Sequence[float], *, name: str) -> None:
    """Raise ValueError for negative weights, and where all are 0."""
    if min(weights) < 0:
        raise ValueError(f"{name}: {min(weights):g} is negative")
    if not any(weights):
        raise ValueError(f"{name}: all are 0, so nothing would be read")


def is_used(train: Sequence[Source], mixture: MixtureConfig | None) -> list[bool]:
    """Return for each source whether the run reads it: False where its weight is 0 in every stage."""
    return [
        not isinstance(source, MixedSource)
        or source.weight != 0
        or any(stage.weights[number] for stage in (mixture.stages if mixture else []))
        for number, source in enumerate(train)
    ]


def used_paths(train: str | Sequence[Source], mixture: MixtureConfig | None) -> list[str]:
    """Return the paths of the sources that the run reads."""
    return _paths(train, mixture, used=True)


def left_out_paths(train: str | Sequence[Source], mixture: MixtureConfig | None) -> list[str]:
    """Return the paths of the sources that the run does not read, as their weight is 0."""
    return _paths(train, mixture, used=False)


def _paths(train: str | Sequence[Source], mixture: MixtureConfig | None, *, used: bool) -> list[str]:
    listed = [train] if isinstance(train, str) else train
    return [
        source if isinstance(source, str) else source.path
        for source, is_read in zip(listed, is_used(listed, mixture), strict=True)
        if is_read == used
    ]
