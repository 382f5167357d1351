"""What a user may call a MODEL, and what comes of it: whole models, adapters, the decoder; nothing is guessed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmtrain.errors import ConfigError
from llmtrain.generation.open_model import locate_model, open_model
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.huggingface.model import HuggingFaceModel
from tests.support.chat import CHATML, LLAMA3, MISTRAL
from tests.support.tiny_huggingface import write_tiny_adapter, write_tiny_chat_folder
from tests.support.tiny_model import write_tiny_model

IDS = torch.tensor([[5, 17, 3, 40, 9]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_chat_folder(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return write_tiny_adapter(base.parent / "adapter", base)


@torch.no_grad()
def test_a_transformers_folder_gives_the_logits_of_transformers(base: Path) -> None:
    opened = open_model(str(base), device="cpu")
    assert isinstance(opened.model, HuggingFaceModel)
    theirs = AutoModelForCausalLM.from_pretrained(base)(IDS).logits
    assert torch.allclose(opened.model.logits(IDS), theirs, atol=1e-5)
    assert opened.chats


@torch.no_grad()
def test_an_adapter_is_loaded_on_its_base_as_peft_loads_it(base: Path, adapter: Path) -> None:
    opened = open_model(str(adapter), device="cpu")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    assert torch.allclose(opened.model.logits(IDS), theirs(IDS).logits, atol=1e-5)
    assert not torch.allclose(opened.model.logits(IDS), open_model(str(base), device="cpu").model.logits(IDS), atol=0.1)
    assert opened.tokenizer is not None
    assert opened.tokenizer.sha256 == open_model(str(base), device="cpu").tokenizer.sha256  # type: ignore[union-attr]


def test_an_adapter_whose_base_is_gone_says_which_and_where_to_correct_it(adapter: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    described = json.loads((moved / "adapter_config.json").read_text())
    described["base_model_name_or_path"] = "/nowhere/base"
    (moved / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"/nowhere/base: there is no such folder.*correct base_model_name_or_path"):
        open_model(str(moved))
    described["base_model_name_or_path"] = str(adapter)
    (moved / "adapter_config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="which is an adapter as well: merge that one first"):
        open_model(str(moved))
    (moved / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="does not say which model it adapts"):
        open_model(str(moved))


def test_an_adapter_of_another_model_is_rejected(base: Path, adapter: Path, tmp_path: Path) -> None:
    other = write_tiny_chat_folder(tmp_path / "other", num_hidden_layers=3)
    described = json.loads((adapter / "adapter_config.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    (moved / "adapter_config.json").write_text(json.dumps({**described, "base_model_name_or_path": str(other)}))
    with pytest.raises(ConfigError, match=r"is of another adapter: .*layers\.2\..* is missing"):
        open_model(str(moved), device="cpu")


def test_our_own_folder_is_the_decoder(tmp_path: Path) -> None:
    write_tiny_model(tmp_path / "ours")
    opened = open_model(str(tmp_path / "ours"), device="cpu")
    assert isinstance(opened.model, Decoder)
    assert not opened.chats
    with pytest.raises(ConfigError, match="has no chat template"):
        opened.generate("x", chat=True)


def test_only_names_of_the_form_owner_slash_name_are_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None]] = []

    def fetch(path: str, *, revision: str | None, **_: object) -> Path:
        asked.append((path, revision))
        raise ConfigError(f"model.path {path} is not on the Hub")

    monkeypatch.setattr("llmtrain.models.fetch._fetch", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    here = (
        "gpt2",
        "latest",
        "runs/latest",
        "runs/gone",
        "models/gone",
        "./a/b",
        "../a/b",
        "/a/b",
        "a/b/c",
        "~/a",
        "a/",
    )
    for ref in (*here, "mine/checkpoints", "owner/", "a b/c"):
        with pytest.raises(ConfigError, match=r"no run|is no run|A MODEL is a run, a checkpoint, the folder"):
            locate_model(ref)
    assert asked == []
    for ref in ("owner/name", "owner/name@v1.0"):
        with pytest.raises(ConfigError, match=r"^owner/name is not on the Hub"):
            locate_model(ref)
    assert asked == [("owner/name", None), ("owner/name", "v1.0")]


def test_a_folder_that_lacks_its_weights_names_them(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        open_model(str(tmp_path / "cut"), device="cpu")


# -- prompts -----------------------------------------------------------------------------------------------------------


def greedy(folder: Path, ids: list[int], num_tokens: int) -> list[int]:
    network = AutoModelForCausalLM.from_pretrained(folder)
    asked = torch.tensor([ids])
    found = network.generate(
        asked, attention_mask=torch.ones_like(asked), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in found[0, len(ids) :]]


@pytest.mark.parametrize("template", [CHATML, LLAMA3, MISTRAL], ids=["chatml", "llama3", "mistral"])
def test_a_turn_is_rendered_as_transformers_renders_it(template: str, tmp_path: Path) -> None:
    folder = write_tiny_chat_folder(tmp_path / "base", template=template, adds_bos=True)
    opened = open_model(str(folder), device="cpu")
    assert opened.tokenizer is not None
    assert opened.encoder is not None
    (answer,) = opened.generate("What is it?", temperature=0, max_new_tokens=12)
    tokenizer = opened.encoder.template.tokenizer
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert opened.prompt_ids(str(answer.rendered), is_complete=True) == asked
    ends = opened.stop_ids(chat=True)
    wanted = greedy(folder, asked, 12)
    cut = next((index for index, token in enumerate(wanted) if token in ends), 12)
    assert answer.completion == opened.tokenizer.decode(wanted[:cut])
    assert answer.tokens == cut


def test_the_next_turn_of_a_conversation_is_generated(tmp_path: Path) -> None:
    opened = open_model(str(write_tiny_chat_folder(tmp_path / "base", adds_bos=True)), device="cpu")
    turns = [("user", "What is it?"), ("assistant", "red"), ("user", "And then?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    alone, answer = opened.generate(["And then?", messages], temperature=0, max_new_tokens=8)
    assert answer.prompt == "And then?"
    header = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nred<|im_end|>\n"
    assert answer.rendered == header + str(alone.rendered)
    with pytest.raises(ConfigError, match=r"a prompt is a conversation, but .* only completes texts"):
        opened.generate([messages], chat=False)


def test_a_plain_prompt_begins_with_bos_if_the_tokenizer_adds_it(tmp_path: Path) -> None:
    folder = write_tiny_chat_folder(tmp_path / "base", adds_bos=True)
    opened = open_model(str(folder), device="cpu")
    assert opened.encoder is not None
    tokenizer = opened.encoder.template.tokenizer
    assert opened.prompt_ids("What is it?", is_complete=False) == tokenizer("What is it?").input_ids
    (plain,) = opened.generate("What is it?", temperature=0, max_new_tokens=8, chat=False, heal=False)
    assert plain.rendered is None
    assert opened.tokenizer is not None
    wanted = greedy(folder, tokenizer("What is it?").input_ids, 8)
    cut = next((index for index, token in enumerate(wanted) if token in opened.eos_ids), 8)
    assert plain.completion == opened.tokenizer.decode(wanted[:cut])


def test_every_declared_end_token_ends_a_text(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "ends")
    (tmp_path / "ends" / "generation_config.json").write_text('{"eos_token_id": [7, 11]}')
    opened = open_model(str(tmp_path / "ends"), device="cpu")
    assert {7, 11} <= opened.eos_ids
    assert opened.tokenizer is not None
    assert opened.stop_ids(chat=True) == opened.eos_ids | {opened.tokenizer.token_id("<|im_end|>")}


@pytest.mark.parametrize("ref", ["checkpoints/step_20.pt", "checkpoints/step0005000", "epoch-3/rank-0"])
def test_an_old_checkpoint_is_not_looked_for_on_the_hub(
    ref: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtrain.models.fetch._fetch", lambda *args, **options: pytest.fail("the Hub was asked"))
    with pytest.raises(ConfigError, match="is no checkpoint of a run"):
        locate_model(ref, root_dir=str(tmp_path))


def test_a_prompt_with_tokens_that_the_embedding_lacks_is_rejected_by_their_names(tmp_path: Path) -> None:
    base = write_tiny_chat_folder(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<new{n}>" for n in range(7)]}, False)
    tokenizer.save_pretrained(base)
    opened = open_model(str(base), device="cpu")
    assert opened.generate("It is", chat=False, max_new_tokens=2)[0].tokens <= 2
    with pytest.raises(ConfigError, match=rf"of {rows} rows, has none: <new0> \({rows}\), .* and 2 more"):
        opened.generate("What is <new3>?", chat=False, max_new_tokens=2)
