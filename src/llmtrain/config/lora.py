"""`model.lora`: adapters, for either kind of model."""

from __future__ import annotations

import re

from pydantic import model_validator

from llmtrain.config.base import Section, opt


class LoraConfig(Section):
    """Low-rank adapters on linear layers (Hu et al. 2021, arXiv:2106.09685); all else is frozen."""

    r: int = opt(16, "Rank of the adapters.", ge=1)
    alpha: float = opt(32.0, "Adapters are scaled by alpha / r (rslora: alpha / sqrt(r)).", gt=0)
    dropout: float = opt(0.0, "Dropout on the adapters' input.", ge=0, lt=1)
    target_modules: str | list[str] = opt(
        "all-linear", "all-linear (but the output), a list of names, or a pattern for the whole of a module's name."
    )
    rslora: bool = opt(False, "Scale by alpha / sqrt(r), which suits a large r (arXiv:2312.03732).")
    dora: bool = opt(False, "Train the weights' magnitudes as well (arXiv:2402.09353); slower.")
    modules_to_save: list[str] = opt([], "Modules trained whole and saved with the adapter, as embed_tokens.")

    @model_validator(mode="after")
    def _targets(self) -> LoraConfig:
        if not self.target_modules:
            raise ValueError("target_modules is empty: say all-linear, names of linear layers, or a pattern")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules {self.target_modules!r} is no pattern: {error}") from None
        return self

    @property
    def begins_with_base(self) -> bool:
        """Whether what is trained begins with values of the base model, which must be there by then."""
        return self.dora or bool(self.modules_to_save)
