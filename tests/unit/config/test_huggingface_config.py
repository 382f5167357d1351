"""The model section of the name `huggingface`: what is taken, and what is refused with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.lora import LoraConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_path_is_enough() -> None:
    config = HuggingFaceConfig(path="owner/name")
    assert (config.init, config.lora, config.quantization, config.trust_remote_code) == (
        "pretrained",
        None,
        "none",
        False,
    )
    assert LoraConfig().target_modules == "all-linear"


def test_every_key_is_described() -> None:
    fields = [*HuggingFaceConfig.model_fields.values(), *LoraConfig.model_fields.values()]
    assert all(field.description and field.description.endswith(".") for field in fields)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trust_remote_code": True}, "commit of 40 hexadecimal digits"),
        ({"trust_remote_code": True, "revision": "main"}, "not 'main'"),
        ({"quantization": "nf4"}, "cannot be trained: add model.lora"),
        ({"init": "random", "lora": {}}, "init: random trains all weights"),
        ({"lora": {"target_modules": []}}, "target_modules is empty"),
        ({"lora": {"target_modules": "(q_proj"}}, "is not a valid pattern"),
        ({"lora": {"rank": 8}}, "Extra inputs"),
        ({"lora": {"dropout": 1.0}}, "less than 1"),
    ],
)
def test_keys_that_contradict_each_other_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        HuggingFaceConfig.model_validate({"path": "owner/name", **settings})


def test_code_of_others_runs_from_a_pinned_commit_or_a_folder_on_this_machine(tmp_path: Path) -> None:
    assert HuggingFaceConfig(path="owner/name", revision=COMMIT, trust_remote_code=True).trust_remote_code
    assert HuggingFaceConfig(path=str(tmp_path), trust_remote_code=True).trust_remote_code
