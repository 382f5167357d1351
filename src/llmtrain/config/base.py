"""The base of every config section: strict, frozen, documented."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """A section of the config: unknown keys are errors, values cannot change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


def key(description: str, **constraints: Any) -> Any:
    """A required key; `description` feeds --help, the docs and the JSON Schema."""
    return Field(description=description, **constraints)


def opt(default: Any, description: str, **constraints: Any) -> Any:
    """A key with a default, which lives here and nowhere else."""
    return Field(default=default, description=description, **constraints)
