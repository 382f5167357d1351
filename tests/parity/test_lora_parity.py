"""LoRA here against peft's own on transformers' own loss: same loss, same gradients, same logits on reload."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from llmtrain.config.sections.huggingface import HuggingFaceConfig
from llmtrain.config.sections.lora import LoraConfig
from llmtrain.contracts import IGNORE_INDEX
from llmtrain.errors import ConfigError
from llmtrain.models.huggingface.folder import (
    checkpoint_tensors,
    read_huggingface_folder,
    write_huggingface_folder,
)
from llmtrain.models.huggingface.load import build_huggingface
from llmtrain.models.huggingface.model import HuggingFaceModel
from llmtrain.models.lora import add_lora_to_decoder, read_adapter, trainable_state_dict, write_adapter
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_decoder
from tests.support.tiny_huggingface import VOCAB_SIZE, tiny_network, write_tiny_folder

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"rslora": True},
    "dora": {"dora": True},
    "names": {"target_modules": ["q_proj", "v_proj"]},
    "pattern": {"target_modules": r".*\.(q|v)_proj"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
}


def tuned(folder: Path, **lora: Any) -> HuggingFaceModel:
    """The model in a folder with adapters that have had an effect, since B is not 0."""
    config = HuggingFaceConfig(path=str(folder), lora=LoraConfig.model_validate({"r": 4, "alpha": 8, **lora}))
    model = build_huggingface(config, folder, seed=0, precision="32").eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def peft_config(lora: dict[str, Any]) -> peft.LoraConfig:
    ours = LoraConfig.model_validate({"r": 4, "alpha": 8, **lora})
    return peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=ours.target_modules,
        use_rslora=ours.rslora,
        use_dora=ours.dora,
        modules_to_save=ours.modules_to_save or None,
        task_type="CAUSAL_LM",
    )


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_a_step_has_the_loss_and_the_gradients_of_peft(tmp_path: Path, variant: str) -> None:
    ours = tuned(write_tiny_folder(tmp_path), **VARIANTS[variant])
    base = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    theirs = peft.get_peft_model(base, peft_config(VARIANTS[variant])).eval()
    assert {n for n, p in theirs.named_parameters() if p.requires_grad} == trainable_state_dict(ours.network).keys()
    theirs.load_state_dict(ours.network.state_dict())

    batch = random_batch(VOCAB_SIZE, ignored_fraction=0.5)
    loss_sum, num_tokens = ours(batch)
    (loss_sum / num_tokens).backward()
    shifted = torch.full_like(batch["labels"], IGNORE_INDEX)  # transformers moves labels by one itself
    shifted[:, 1:] = batch["labels"][:, :-1]
    last = batch["labels"][:, -1:]
    inputs = torch.cat([batch["input_ids"], torch.zeros_like(last)], dim=1)
    expected = theirs(input_ids=inputs, labels=torch.cat([shifted, last], dim=1)).loss
    expected.backward()
    torch.testing.assert_close(loss_sum / num_tokens, expected, rtol=1e-5, atol=1e-6)
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    for name, parameter in ours.network.named_parameters():
        if parameter.requires_grad:
            assert isinstance(parameter.grad, Tensor)
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
        else:
            assert parameter.grad is None


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_an_adapter_reloads_in_plain_peft_with_equal_logits(tmp_path: Path, variant: str) -> None:
    base_folder, folder = write_tiny_folder(tmp_path / "base"), tmp_path / "model"
    model = tuned(base_folder, **VARIANTS[variant])
    write_huggingface_folder(
        folder,
        model=model,
        state_dict=checkpoint_tensors(model),
        tokenizer_folder=base_folder,
        base=base_folder,
    )
    names = {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    assert names | {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} == {
        file.name for file in folder.iterdir()
    }
    reloaded = peft.AutoPeftModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    input_ids = random_batch(VOCAB_SIZE)["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(reloaded(input_ids=input_ids).logits, model.logits(input_ids), rtol=0, atol=1e-5)
    assert peft.PeftConfig.from_pretrained(folder).base_model_name_or_path == str(base_folder.resolve())


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_an_adapter_is_taken_up_again_exactly(tmp_path: Path, variant: str) -> None:
    base_folder, folder = write_tiny_folder(tmp_path / "base"), tmp_path / "model"
    model = tuned(base_folder, **VARIANTS[variant])
    saved = {name: tensor.clone() for name, tensor in checkpoint_tensors(model).items()}
    for tensor in model.network.parameters():  # what is written is the snapshot, not what the model has become
        if tensor.requires_grad:
            tensor.data.zero_()
    write_huggingface_folder(folder, model=model, state_dict=saved, tokenizer_folder=None)
    read_huggingface_folder(folder, model)
    for name, tensor in checkpoint_tensors(model).items():
        assert torch.equal(tensor, saved[name]), name


def test_an_adapter_of_another_rank_is_refused(tmp_path: Path) -> None:
    base_folder = write_tiny_folder(tmp_path / "base")
    model = tuned(base_folder, r=4)
    write_huggingface_folder(
        tmp_path / "model", model=model, state_dict=checkpoint_tensors(model), tokenizer_folder=None
    )
    with pytest.raises(ConfigError, match=r"of another adapter: .*has shape \[4, 32\], expected \[8, 32\]"):
        read_huggingface_folder(tmp_path / "model", tuned(base_folder, r=8))


def test_a_target_that_matches_nothing_is_an_error_that_lists_the_layers(tmp_path: Path) -> None:
    folder = write_tiny_folder(tmp_path)
    for target, shown in ((["q_proj", "c_attn"], "'c_attn'"), (r".*\.c_attn", "c_attn'")):
        with pytest.raises(ConfigError, match=r"matches no linear layer.*down_proj, gate_proj.*q_proj") as caught:
            tuned(folder, target_modules=target)
        assert shown in str(caught.value)
    with pytest.raises(ConfigError, match=r"modules_to_save: the model has no 'wte'. There are .*embed_tokens"):
        tuned(folder, modules_to_save=["wte"])


def test_all_linear_leaves_the_output_alone_and_finds_gpt2s_layers(tmp_path: Path) -> None:
    model = tuned(write_tiny_folder(tmp_path, "gpt2"))
    layers = {name.rpartition(".lora_A")[0] for name in trainable_state_dict(model.network) if "lora_A" in name}
    assert {layer.rpartition(".")[2] for layer in layers} == {"c_attn", "c_proj", "c_fc"}
    assert len(layers) == 8


def test_adapters_are_float32_on_a_base_in_bfloat16(tmp_path: Path) -> None:
    config = HuggingFaceConfig(path=str(write_tiny_folder(tmp_path)), lora=LoraConfig(r=4))
    model = build_huggingface(config, tmp_path, seed=0, precision="bf16-mixed")
    dtypes = {parameter.requires_grad: parameter.dtype for parameter in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    batch = random_batch(VOCAB_SIZE, num_documents=3)
    with torch.autocast("cpu", torch.bfloat16):
        loss_sum, num_tokens = model(batch)
    loss_sum.backward()
    exact = HuggingFaceModel(tiny_network("llama"))(batch)[0]
    assert float((loss_sum / num_tokens).detach()) == pytest.approx(float((exact / num_tokens).detach()), rel=0.02)
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(grad is not None and grad.dtype == torch.float32 for grad in grads)


@pytest.mark.slow
def test_lora_compiled_and_with_activation_checkpointing_gives_the_same_gradients(tmp_path: Path) -> None:
    folder, batch, grads = write_tiny_folder(tmp_path), random_batch(VOCAB_SIZE, num_documents=3), []
    for changed in (False, True):
        model = tuned(folder).train()
        if changed:
            model.checkpoint_blocks()
            model.compile_parts()
        model(batch)[0].backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        names = list(checkpoint_tensors(model))
    assert not any("_orig_mod" in name for name in names)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


# -- the decoder that is built here ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_takes_lora_and_starts_where_it_was(tied: bool, tmp_path: Path) -> None:
    decoder, batch = tiny_decoder(tie_embeddings=tied), random_batch(num_documents=3)
    before = decoder(batch)[0].detach()
    add_lora_to_decoder(decoder, LoraConfig(r=4, alpha=8))
    loss_sum, _ = decoder(batch)
    loss_sum.backward()
    torch.testing.assert_close(loss_sum.detach(), before)
    trained = trainable_state_dict(decoder)
    assert len(trained) == 2 * 2 * 7  # two layers of seven products, and A and B of each
    assert all(isinstance(decoder.get_parameter(name).grad, Tensor) for name in trained)
    assert all(p.grad is None for p in decoder.parameters() if not p.requires_grad)

    with torch.no_grad():
        for tensor in trained.values():
            tensor.add_(0.1)
    adapted = decoder.logits(batch["input_ids"])
    write_adapter(tmp_path, decoder, trained)
    again = tiny_decoder(tie_embeddings=tied)
    add_lora_to_decoder(again, LoraConfig(r=4, alpha=8))
    read_adapter(tmp_path, again)
    torch.testing.assert_close(again.logits(batch["input_ids"]), adapted)


def test_the_decoders_targets_are_checked() -> None:
    for target in (["c_attn"], "blocks.9.*"):
        with pytest.raises(ConfigError, match=r"matches no linear layer of the model. There are .*q_proj"):
            add_lora_to_decoder(tiny_decoder(), LoraConfig(target_modules=target))
    with pytest.raises(ConfigError, match="output can have no adapter"):
        add_lora_to_decoder(tiny_decoder(tie_embeddings=False), LoraConfig(target_modules=["output"]))
    assert tiny_decoder().vocab_size == TINY_VOCAB_SIZE
