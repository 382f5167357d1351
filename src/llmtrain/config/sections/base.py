"""The base of every config section: it rejects unknown keys, cannot be changed, and describes its keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from llmtrain.local_paths import ADDRESS, LOCAL, LOCAL_OR_HUB, STORE, checked_path

MOST = 10**15
"""Largest integer of a key without a limit of its own: products of several keys stay below 2⁶³."""


class Alternatives(NamedTuple):
    """Keys of one section that say the same thing in different ways, so that one of them is given."""

    keys: tuple[str, ...]
    may_agree: bool = False
    """Several may be given; where they contradict each other is checked elsewhere."""


class Section(BaseModel):
    """A section of the config. Unknown keys are errors; values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())
    alternatives: ClassVar[tuple[Alternatives, ...]] = ()
    """A key that is given later, on the command line, takes the place of its alternatives in the file."""

    @classmethod
    def is_given(cls, name: str, value: Any) -> bool:
        """Return whether a value of a key says more than its default."""
        return value is not None and value != cls.model_fields[name].default

    @model_validator(mode="after")
    def _one_of_the_alternatives(self) -> Self:
        for group in self.alternatives:
            given = [name for name in group.keys if self.is_given(name, getattr(self, name))]
            if len(given) > 1 and not group.may_agree:
                raise ValueError(
                    f"give {' or '.join(given)}, not {'both' if len(given) == 2 else 'all of them'} (null removes one)"
                )
        return self

    @field_validator("*")
    @classmethod
    def _integers_are_in_range(cls, value: Any, info: ValidationInfo) -> Any:
        has_limit = any(
            hasattr(one, "lt") or hasattr(one, "le") for one in cls.model_fields[str(info.field_name)].metadata
        )
        if type(value) is int and abs(value) > MOST and not has_limit:
            raise ValueError(f"expected a number ≤ {MOST:,} (got {value})")
        return value

    @field_validator("*")
    @classmethod
    def _paths_are_of_the_kind_that_the_key_takes(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].json_schema_extra
        return _checked(value, kind) if kind in (LOCAL, LOCAL_OR_HUB, ADDRESS, STORE) else value


def _checked(value: Any, kind: Any) -> Any:
    """Return the value of a key with paths in place of `file://`: a path, a section with one, or a list of these.

    Raises ConfigError as `checked_path`.
    """
    if isinstance(value, list):
        return [_checked(one, kind) for one in value]
    if isinstance(value, str):
        return checked_path(value, kind)
    if isinstance(path := getattr(value, "path", None), str):
        checked_path(path, kind)
    return value


def key(description: str, **constraints: Any) -> Any:
    """Return a required key; its description stands in messages, the docs and the JSON Schema."""
    return Field(description=description, **constraints)


def opt(default: Any, description: str, **constraints: Any) -> Any:
    """Return a key with a default, which is written here and nowhere else."""
    return Field(default=default, description=description, **constraints)


IMPORT_PATH = "package.module:Class"
"""The variant of a section whose `name` is an import path; a variant of llmtrain's own is called by its name."""
IMPORT_PATTERN = r"^[\w.]+:\w+$"


def variant_named(name: object) -> str | None:
    """Return the variant of a section that a `name` means; None where there is no name."""
    return IMPORT_PATH if isinstance(name, str) and ":" in name else None if name is None else str(name)


def variant_of_section(values: Any) -> str | None:
    """Return the variant of a section from its values, or from the section; for pydantic's Discriminator."""
    return variant_named(values.get("name") if isinstance(values, Mapping) else getattr(values, "name", None))
