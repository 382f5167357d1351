"""The files that travel with a model: which they are, and how end tokens are added."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from llmtrain.data.tokenizers import folder_fingerprint
from llmtrain.errors import ConfigError
from llmtrain.generation.open_model import load_language_model
from llmtrain.models.companions import (
    copy_companions,
    copy_tokenizer,
    end_tokens,
    has_chat_template,
    has_tokenizer,
    set_end_tokens,
    tokenizer_files,
)
from llmtrain.training.setup.trained import Vocabulary
from tests.support.full_base import MADE_FOR_PROCESSORS, TOOL_USE, write_full_base

GREEDY = {"do_sample": False, "temperature": 0.5, "eos_token_id": 1}


def test_named_templates_belong_to_the_tokenizer(tmp_path: Path) -> None:
    base = write_full_base(tmp_path / "base", generation=GREEDY)
    assert "additional_chat_templates/tool_use.jinja" in tokenizer_files(base)
    (tmp_path / "model" / "additional_chat_templates").mkdir(parents=True)
    (tmp_path / "model" / "additional_chat_templates" / "old.jinja").write_text("of another tokenizer")
    copy_tokenizer(base, tmp_path / "model")
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template.keys() == {"default", "tool_use", "rag"}
    before = folder_fingerprint(str(base))
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("another")
    assert folder_fingerprint(str(base)) != before


def test_a_users_own_template_replaces_all_others(tmp_path: Path) -> None:
    base = write_full_base(tmp_path / "base", generation=GREEDY)
    Vocabulary(size=1, tokenizer_folder=base).write_template(base)
    assert AutoTokenizer.from_pretrained(base).get_chat_template(tools=[{}]) == TOOL_USE
    Vocabulary(size=1, tokenizer_folder=base, chat_template="{{ own }}").write_template(base)
    assert AutoTokenizer.from_pretrained(base).chat_template == "{{ own }}"


def test_templates_alone_do_not_count_as_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("{{ messages }}")
    assert has_chat_template(tmp_path)
    assert not has_tokenizer(tmp_path)


@pytest.mark.parametrize("code", [False, True])
def test_processors_licence_and_code_are_copied_and_weights_are_not(tmp_path: Path, code: bool) -> None:
    base = write_full_base(tmp_path / "base", generation=GREEDY, code=code)
    (base / "stray.py").write_text("")
    (tmp_path / "out").mkdir()
    copy_companions(base, tmp_path / "out")
    expected = {*MADE_FOR_PROCESSORS, "generation_config.json", "LICENSE", *(["own.py", "stray.py"] if code else [])}
    assert {path.name for path in (tmp_path / "out").iterdir()} == expected


def test_end_tokens_are_added_and_nothing_else_changes(tmp_path: Path) -> None:
    file = tmp_path / "generation_config.json"
    file.write_text(written := json.dumps(GREEDY))
    set_end_tokens(tmp_path, {1})
    assert file.read_text() == written
    set_end_tokens(tmp_path, {4, 1})
    assert json.loads(file.read_text()) == {**GREEDY, "eos_token_id": [1, 4]}
    (tmp_path / "config.json").write_text('{"eos_token_id": 9}')
    assert list(end_tokens(tmp_path)) == [1, 4, 9]
    file.write_text("{")
    with pytest.raises(ConfigError, match=r"generation_config\.json is not JSON"):
        list(end_tokens(tmp_path))


@pytest.mark.parametrize("template_files", [True, False])
def test_generation_renders_tools_with_the_named_template(tmp_path: Path, template_files: bool) -> None:
    import torch

    base = write_full_base(tmp_path / "base", generation=GREEDY, template_files=template_files)
    opened = load_language_model(base, device=torch.device("cpu"))
    tool = {"type": "function", "function": {"name": "weather"}}
    turns = [{"role": "user", "content": "?"}]
    assert "# Tools of the named template" in opened.render(turns, [tool])
    assert "# Tools" not in opened.render(turns)
