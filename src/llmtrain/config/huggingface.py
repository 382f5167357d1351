"""`model` of the name `huggingface`: a causal model in the format of transformers, tuned whole or through LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from llmtrain.config.base import Section, key, opt
from llmtrain.config.lora import LoraConfig


class HuggingFaceConfig(Section):
    """A model of transformers, from a folder or from the Hub."""

    name: Literal["huggingface"] = opt("huggingface", "A causal model in the format of transformers.")
    path: str = key(
        "A model folder, a run (its id, its name, or latest), or the id of a model on the Hub (owner/name).",
        min_length=1,
    )
    revision: str | None = opt(None, "Branch, tag or commit on the Hub.")
    local_files_only: bool = opt(False, "Use what is on this machine, and never the network.")
    tokenizer: str | None = opt(None, "Folder or Hub id of the tokenizer; the model's own when not given.")
    init: Literal["pretrained", "random"] = opt("pretrained", "random: only the config is used, and weights are drawn.")
    trust_remote_code: bool = opt(False, "Run Python code that comes with the model; it needs a commit as revision.")
    attn_implementation: str | None = opt(
        None, "eager, sdpa, flash_attention_2, …; the model's default when not given."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto",
        "Of the weights. auto: float32 where they are trained or trainer.precision is 32 or 16-mixed; bfloat16 where "
        "they are frozen, or precision is bf16-true.",
    )
    lora: LoraConfig | None = opt(None, "Train adapters instead of all weights.")
    quantization: Literal["none", "nf4", "int8"] = opt(
        "none", "Frozen weights in 4 or 8 bits, below adapters (bitsandbytes)."
    )

    @model_validator(mode="after")
    def _agrees(self) -> HuggingFaceConfig:
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or Path(self.path).expanduser().is_dir()
        if self.trust_remote_code and not pinned:
            raise ValueError(
                "trust_remote_code runs code of others, so revision must be a commit of 40 hexadecimal digits, "
                f"not {self.revision!r}"
            )
        if self.quantization != "none" and self.lora is None:
            raise ValueError(
                f"weights in {self.quantization} cannot be trained: add model.lora, or remove quantization"
            )
        if self.init == "random" and (self.lora is not None or self.quantization != "none"):
            raise ValueError("init: random trains all weights: remove lora and quantization")
        return self
