"""`publish`: where a model goes, and the parts of its card that only its maker knows."""

from __future__ import annotations

import os
import re

from pydantic import field_validator

from llmtrain.config.sections.base import Section, key, opt
from llmtrain.errors import ConfigError
from llmtrain.local_paths import LOCAL

HUB, HUB_PREFIX = "hub", "hub:"
REPO_ID_VARIABLE = "HF_REPO_ID"
_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MAX_REPO_ID = 96


class PublishConfig(Section):
    """Settings of `publish`. With this section `train` publishes at its end, and checks at its start that it may."""

    license: str = key(
        "The model's licence, as the Hub names it: mit, apache-2.0, llama3.1, other.",
        pattern=r"^[a-z0-9][a-z0-9.+-]*$",
    )
    to: str | None = opt(
        None,
        "A folder, or hub:USER/NAME; hub alone takes the name from HF_REPO_ID. artifacts/models/<run_id> when not "
        "given.",
        min_length=1,
        json_schema_extra=LOCAL,
    )
    private: bool = opt(True, "Whether a new repository on the Hub is private to you.")
    base_model: str | None = opt(
        None, "Hub id of the base model, for a model that was tuned from a local folder.", min_length=1
    )
    require_improvement: str | None = opt(
        None, "Publish only if the comparison with the baseline shows that this metric is better.", min_length=1
    )
    description: str | None = opt(None, "Purpose of the model, for its card.")
    limits: str | None = opt(None, "Limits and unsuitable uses of the model, for its card.")
    tags: list[str] = opt([], "More tags of the card.")

    @field_validator("to")
    @classmethod
    def _is_a_place(cls, value: str | None) -> str | None:
        if value is not None and value.startswith(HUB_PREFIX):
            check_repo_id(value.removeprefix(HUB_PREFIX))
        return value

    @property
    def repo_id(self) -> str | None:
        """USER/NAME on the Hub; None for a folder. Raises ConfigError for `hub` alone where HF_REPO_ID is not set."""
        if self.to != HUB:
            return self.to.removeprefix(HUB_PREFIX) if self.to and self.to.startswith(HUB_PREFIX) else None
        name = os.environ.get(REPO_ID_VARIABLE, "")
        if not name:
            raise ConfigError(f"publish.to is hub: name it, hub:USER/NAME, or set {REPO_ID_VARIABLE}")
        check_repo_id(name)
        return name


def check_repo_id(name: str) -> None:
    """Raise ConfigError unless the Hub takes `name` as the name of a repository."""
    well_formed = _REPO_ID.fullmatch(name) is not None and len(name) <= MAX_REPO_ID
    if not well_formed or "--" in name or ".." in name or name.endswith((".git", ".ipynb", ".", "-")):
        raise ConfigError(
            f"{name!r} is not a valid name on the Hub: it should be USER/NAME of letters, digits, single - and ., _, "
            f"at most {MAX_REPO_ID} characters, beginning and ending in a letter or digit"
        )
