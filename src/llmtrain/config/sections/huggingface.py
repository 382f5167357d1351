"""`model` of the name `huggingface`: a causal model in the format of transformers, fine-tuned fully or with LoRA."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import model_validator

from llmtrain.config.sections.base import Section, key, opt
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.local_paths import ADDRESS


class HuggingFaceConfig(Section):
    """A model of transformers, from a folder or from the Hub."""

    name: Literal["huggingface"] = opt("huggingface", "A causal model in the format of transformers.")
    path: str = key(
        "A model folder, its address, a run (its id, its name, or latest), or the id of a model on the Hub "
        "(owner/name).",
        min_length=1,
        json_schema_extra=ADDRESS,
    )
    revision: str | None = opt(None, "Branch, tag or commit on the Hub.")
    local_files_only: bool = opt(False, "Use only files on this machine, never the network.")
    tokenizer: str | None = opt(
        None,
        "Folder, its address, or Hub id of the tokenizer; the model's own when not given.",
        json_schema_extra=ADDRESS,
    )
    init: Literal["pretrained", "random"] = opt(
        "pretrained", "random: use the config of the model alone, and draw new weights."
    )
    resize_embeddings: bool = opt(
        False, "Give the embedding rows for tokens of the tokenizer that it has none for; trained as all weights are."
    )
    trust_remote_code: bool = opt(False, "Run Python code that comes with the model; revision must be a commit then.")
    attn_implementation: str | None = opt(
        None, "eager, sdpa, flash_attention_2, …; the model's default when not given."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = opt(
        "auto",
        "Type of the weights. auto: float32 for trained weights and with trainer.precision 32 or 16-mixed; bfloat16 "
        "for frozen weights and with bf16-true.",
    )
    lora: LoraConfig | None = opt(None, "Train adapters instead of all weights.")
    quantization: Literal["none", "nf4", "int8"] = opt(
        "none", "Store the frozen weights below adapters in 4 or 8 bits (bitsandbytes)."
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
        if self.resize_embeddings and self.lora is not None:
            raise ValueError(
                "resize_embeddings: an adapter does not hold the new rows: add them to the base first (transformers: "
                "resize_token_embeddings, then save_pretrained), or remove lora"
            )
        if self.init == "random" and (self.lora is not None or self.quantization != "none"):
            raise ValueError("init: random trains all weights: remove lora and quantization")
        return self
