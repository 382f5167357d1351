"""`model` and `data` of a name that is an import path: a class of the user's own. The contracts are in contracts.py."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from llmtrain.config.sections.base import IMPORT_PATTERN, Section, key, opt
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.local_paths import LOCAL


class OwnModelConfig(Section):
    """A model of your own: a torch module that meets `llmtrain.contracts.Model`."""

    name: str = key("Its import path, package.module:Class.", pattern=IMPORT_PATTERN)
    options: dict[str, Any] = opt({}, "Keyword arguments of the class, besides vocab_size.")
    init_from: str | None = opt(
        None,
        "Model of the same class and options to start from: a run, a checkpoint or a model folder.",
        min_length=1,
        json_schema_extra=LOCAL,
    )
    lora: LoraConfig | None = opt(None, "Train adapters on linear layers instead of all weights; needs init_from.")

    @model_validator(mode="after")
    def _tunes_what_is_there(self) -> OwnModelConfig:
        if self.lora is not None:
            self.lora.check_inside(init_from=self.init_from)
            if self.lora.target_parameters:
                raise ValueError("lora.target_parameters is for models of name huggingface: remove it")
        return self


class OwnDataConfig(Section):
    """Data of your own: a class that meets `llmtrain.contracts.TokenSequences`."""

    name: str = key("Its import path, package.module:Class.", pattern=IMPORT_PATTERN)
    options: dict[str, Any] = opt({}, "Keyword arguments of the class, besides split and seq_len.")
    seq_len: int = opt(1024, "Length of a sequence, in tokens that the model predicts.", ge=1)
    num_workers: int = opt(0, "Processes that read ahead; with 0 the training process reads.", ge=0)
