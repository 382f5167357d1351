"""`model.lora`: adapters, for both kinds of model."""

from __future__ import annotations

import re

from pydantic import model_validator

from llmtrain.config.sections.base import Section, opt


class LoraConfig(Section):
    """Low-rank adapters on linear layers (Hu et al. 2021, arXiv:2106.09685); all other weights are frozen."""

    r: int = opt(16, "Rank of the adapters.", ge=1)
    alpha: float = opt(32.0, "Adapters are scaled by alpha / r (rslora: alpha / sqrt(r)).", gt=0)
    dropout: float = opt(0.0, "Dropout on the adapters' input.", ge=0, lt=1)
    target_modules: str | list[str] = opt(
        "all-linear",
        "all-linear (except the output layer), a list of names, or a pattern that matches the full name of a module.",
    )
    target_parameters: list[str] = opt(
        [],
        "Matrices outside of linear layers that are adapted too, by the end of their names: a mixture's experts are "
        "mlp.experts.gate_up_proj and mlp.experts.down_proj.",
    )
    rslora: bool = opt(False, "Scale by alpha / sqrt(r), which suits a large r (arXiv:2312.03732).")
    dora: bool = opt(False, "Train the weights' magnitudes as well (arXiv:2402.09353); slower.")
    modules_to_save: list[str] = opt(
        [], "Modules that are trained fully and saved with the adapter, such as embed_tokens."
    )

    @model_validator(mode="after")
    def _targets(self) -> LoraConfig:
        if not self.target_modules and not self.target_parameters:
            raise ValueError("target_modules is empty: give all-linear, names of linear layers, or a pattern")
        if self.target_parameters and (self.dropout or self.dora):
            raise ValueError("target_parameters are adapted without dropout and dora: remove these, or the parameters")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            try:
                re.compile(self.target_modules)
            except re.error as error:
                raise ValueError(f"target_modules {self.target_modules!r} is not a valid pattern: {error}") from None
        return self

    def check_inside(self, *, init_from: str | None) -> None:
        """Raise ValueError for what only models of transformers can have, and for adapters on random weights."""
        if init_from is None:
            raise ValueError(
                "lora trains adapters on frozen weights, and these would be random: name a trained model in init_from, "
                "or remove lora"
            )
        if self.modules_to_save:
            raise ValueError("lora.modules_to_save is for models of name huggingface: remove it")

    @property
    def begins_with_base(self) -> bool:
        """True if some trained weights start from values of the base model, which must be loaded first."""
        return self.dora or bool(self.modules_to_save)
