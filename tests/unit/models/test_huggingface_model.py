"""The wrapper around models of transformers: loss, packing, and what it never holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.data.document_bounds import cu_seqlens
from llmtrain.errors import ConfigError
from llmtrain.models.decoder import loss
from llmtrain.models.decoder.position import restarting_positions
from llmtrain.models.huggingface.model import HuggingFaceModel, block_causal
from tests.support.tiny import random_batch
from tests.support.tiny_huggingface import FAMILIES, VOCAB_SIZE, WITHOUT_SDPA, tiny_huggingface

BACKENDS = [
    (family, attention)
    for family in FAMILIES
    for attention in ("eager", "sdpa")
    if attention == "eager" or family not in WITHOUT_SDPA
]


def packed_batch(**changes: Any) -> Batch:
    return random_batch(VOCAB_SIZE, seq_len=24, num_documents=4, ignored_fraction=0.4, **changes)


def reference_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


@pytest.mark.parametrize(("family", "attention"), BACKENDS)
def test_a_document_in_a_pack_has_the_logits_that_it_has_alone(family: str, attention: str) -> None:
    model, batch = tiny_huggingface(family, attention=attention), packed_batch()
    with torch.no_grad():
        packed = model.logits(batch["input_ids"], batch["document_ids"])
        for row, (tokens, documents) in enumerate(zip(batch["input_ids"], batch["document_ids"], strict=True)):
            for document in documents.unique():
                inside = documents == document
                alone = model.network(input_ids=tokens[inside][None]).logits[0]
                torch.testing.assert_close(packed[row, inside], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_loss_is_that_of_the_models_own_logits_and_so_are_its_gradients(family: str) -> None:
    model, batch = tiny_huggingface(family), packed_batch(seed=1)
    loss_sum, num_tokens = model(batch)
    assert loss_sum.dtype == torch.float32
    assert num_tokens.dtype == torch.int64
    assert int(num_tokens) == int((batch["labels"] != IGNORE_INDEX).sum())
    loss_sum.backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = reference_loss(model.logits(batch["input_ids"], batch["document_ids"]), batch["labels"])
    expected.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2"])
def test_a_frozen_head_gets_no_gradient_and_hidden_states_the_same_one(family: str) -> None:
    batch = packed_batch()
    grads = []
    for frozen in (False, True):
        model = tiny_huggingface(family, tie_word_embeddings=False)
        model.causal_lm.get_output_embeddings().requires_grad_(not frozen)
        model(batch)[0].backward()
        grads.append([p.grad for block in model.layers() for p in block.parameters()])
    assert model.causal_lm.get_output_embeddings().weight.grad is None
    for trained, left in zip(*grads, strict=True):
        torch.testing.assert_close(left, trained, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma2", "cohere"])
@pytest.mark.parametrize("known", [True, False])
def test_logits_of_tokens_that_are_not_supervised_are_never_made(family: str, known: bool) -> None:
    model, batch = tiny_huggingface(family), random_batch(VOCAB_SIZE, batch_size=4, seq_len=32)
    model(batch)  # the one trial of a few tokens is over
    model._head_is_known = known
    batch["labels"][:, 5:] = IGNORE_INDEX
    largest = 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim and out.shape[-1] == VOCAB_SIZE:
                largest = max(largest, out.numel() // VOCAB_SIZE)
            return out

    with Watch():
        loss_sum, num_tokens = model(batch)
    assert int(num_tokens) == 20
    assert largest in (20, 32)  # 32 rows has a head's weight, [64, 32] transposed
    expected = reference_loss(model.logits(batch["input_ids"]), batch["labels"])
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-5)


def test_the_loss_goes_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_LOGITS_CPU", 16 * VOCAB_SIZE)
    for family in ("gemma2", "phi"):
        model, batch = tiny_huggingface(family), packed_batch(batch_size=3)
        expected = reference_loss(model.logits(batch["input_ids"], batch["document_ids"]), batch["labels"])
        torch.testing.assert_close(model(batch)[0], expected, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(model(batch)[0], expected, rtol=1e-5, atol=1e-5)


def test_a_head_of_an_unknown_kind_is_noticed_and_its_own_forward_used() -> None:
    model, batch = tiny_huggingface("llama"), packed_batch()

    class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 0.5 + torch.arange(out.logits.shape[-1])
            return out

    model.network.__class__ = Odd
    loss_sum, _ = model(batch)
    assert model._head_is_known is False
    expected = reference_loss(model.logits(batch["input_ids"], batch["document_ids"]), batch["labels"])
    torch.testing.assert_close(loss_sum, expected, rtol=1e-5, atol=1e-5)


def test_a_batch_without_a_supervised_token_has_loss_0_and_gradients_of_0() -> None:
    model, batch = tiny_huggingface("llama"), random_batch(VOCAB_SIZE)
    batch["labels"].fill_(IGNORE_INDEX)
    loss_sum, num_tokens = model(batch)
    loss_sum.backward()
    assert (loss_sum.item(), int(num_tokens)) == (0.0, 0)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_a_model_with_a_state_rejects_packed_rows_and_takes_plain_ones() -> None:
    config = transformers.MambaConfig(vocab_size=VOCAB_SIZE, hidden_size=32, num_hidden_layers=2)
    model = HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config))
    batch = packed_batch()
    with pytest.raises(ConfigError, match=r"MambaForCausalLM cannot train on packed rows.*set data\.packing=false"):
        model(batch)
    del batch["document_ids"]
    assert float(model(batch)[0]) > 0


def test_a_model_without_positions_to_restart_rejects_packed_rows() -> None:
    config = transformers.BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=2, n_head=4)
    model = HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config))
    with pytest.raises(ConfigError, match="BloomForCausalLM cannot train on packed rows"):
        model(packed_batch())


def test_a_model_that_mixes_documents_of_a_row_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_huggingface("mistral")
    base_forward = model._base.forward

    def deaf(*, position_ids: Tensor | None = None, **inputs: Any) -> Any:
        return base_forward(**inputs)

    monkeypatch.setattr(model._base, "forward", deaf)
    with pytest.raises(ConfigError, match="documents in one row attend to each other"):
        model(packed_batch())


def test_layers_that_round_by_the_full_batch_can_train_on_packed_rows() -> None:
    """As those of int8 do: a leak is told from their noise."""

    class Rounded(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            scale = x.detach().flatten(0, -2).abs().amax(0) / 20
            return F.linear(x + ((x / scale).round() * scale - x).detach(), self.weight, self.bias)

    model, batch = tiny_huggingface("llama"), packed_batch()
    for module in model._base.modules():
        if type(module) is nn.Linear:
            module.__class__ = Rounded
    assert float(model(batch)[0]) > 0
    assert model._packing == "positions"


def test_positions_restart_at_each_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 2, 2], [5, 5, 1, 1, 1, 5]])
    assert restarting_positions(documents).tolist() == [[0, 1, 2, 0, 0, 1], [0, 1, 0, 1, 2, 0]]
    assert block_causal(documents[:1, 2:5])[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, False, True],
    ]


def test_for_flash_attention_a_packed_batch_becomes_one_row() -> None:
    model, batch, seen = tiny_huggingface("llama"), packed_batch(), {}

    def base(**inputs: Any) -> Any:
        seen.update(inputs)
        return (torch.zeros(*inputs["input_ids"].shape, 32),)

    bounds = torch.tensor([0, 24, 48], dtype=torch.int32)
    model._packed(base, batch["input_ids"], batch["document_ids"], bounds, packing="flat")
    assert seen["input_ids"].shape == (1, 48)
    assert seen["cu_seq_lens_q"] is seen["cu_seq_lens_k"] is bounds
    assert seen["max_length_q"] == seen["max_length_k"] == 24
    assert torch.equal(seen["position_ids"].view(2, 24), restarting_positions(batch["document_ids"]))
    assert seen["attention_mask"] is None
    torch.testing.assert_close(  # and that is the same where a backend other than flash attention gets it
        model._packed(model._base, batch["input_ids"], batch["document_ids"], packing="flat")[0].view(2, 24, 32),
        model._packed(model._base, batch["input_ids"], batch["document_ids"], packing="positions")[0],
        rtol=0,
        atol=1e-5,
    )


def flash_reference(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as flash attention does, of the sequences that it is told of and of nothing else."""
    assert attention_mask is None
    bounds = options.get("cu_seq_lens_q")
    if bounds is None:
        return sdpa_attention_forward(module, query, key, value, None, scaling=options["scaling"])[0], None
    assert bounds is options["cu_seq_lens_k"]
    starts, ends = bounds[:-1].tolist(), bounds[1:].tolist()
    assert max(e - s for s, e in zip(starts, ends, strict=True)) <= options["max_length_q"] == options["max_length_k"]
    pieces = [
        sdpa_attention_forward(module, *(x[:, :, s:e] for x in (query, key, value)), None, scaling=options["scaling"])[
            0
        ]
        for s, e in zip(starts, ends, strict=True)
        if s < e
    ]
    return torch.cat(pieces, dim=1), None


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
def test_flash_attention_is_told_in_every_layer_where_documents_begin(family: str, recomputed: bool) -> None:
    AttentionInterface.register("flash_reference", flash_reference)
    wanted, found = (tiny_huggingface(family, attention="sdpa").train() for _ in range(2))
    batch = packed_batch()
    batch["cu_seqlens"] = torch.from_numpy(cu_seqlens(batch["document_ids"].numpy()))
    found.causal_lm.config._attn_implementation = "flash_reference"
    if recomputed:
        found.checkpoint_blocks()
    for model in (wanted, found):
        model(batch)[0].backward()
    assert found._packing == "flat"
    for ours, target in zip(found.parameters(), wanted.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, target.grad, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_changes_no_gradient() -> None:
    batch, grads, kept = packed_batch(), [], []
    for count in (0, 1, None):
        model = tiny_huggingface("llama").train()
        assert list(model.checkpointable) == [0, 1, 2]
        model.checkpoint_blocks(count)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):  # type: ignore[misc]
            loss_sum, _ = model(batch)
        loss_sum.backward()
        kept.append(sum(sizes))
        grads.append([loss_sum.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(plain, again) for plain, *others in zip(*grads, strict=True) for again in others)
    assert kept[0] > kept[1] > kept[2]


def test_a_model_with_one_switch_recomputes_all_blocks_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_huggingface("llama")
    monkeypatch.delattr(
        next(c for c in type(model.layers()[0]).__mro__ if "gradient_checkpointing" in vars(c)),
        "gradient_checkpointing",
    )
    assert list(model.checkpointable) == [0, 2]
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM recomputes all of its blocks or none: set it to full"):
        model.checkpoint_blocks(1)
    monkeypatch.setattr(type(model.causal_lm), "supports_gradient_checkpointing", False)
    assert list(model.checkpointable) == [0]
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM does not support it; set it to none"):
        model.checkpoint_blocks(2)


@pytest.mark.slow
def test_compiled_parts_give_the_same_loss_and_keep_the_names() -> None:
    model, batch = tiny_huggingface("llama", attention="sdpa").train(), packed_batch()
    names, expected = list(model.state_dict()), float(model(batch)[0])
    model.compile_parts()
    loss_sum, _ = model(batch)
    loss_sum.backward()
    assert float(loss_sum) == pytest.approx(expected, rel=1e-5)
    assert list(model.state_dict()) == names


def test_flops_count_what_a_token_is_multiplied_with() -> None:
    model = tiny_huggingface("gpt2")  # 2 layers of 12·32² matrices and (9+4)·32 biases and norms; a tied head
    num_weights = 2 * (12 * 32**2 + 13 * 32) + 2 * 32 + VOCAB_SIZE * 32
    assert model.flops_per_token(16) == 6 * num_weights + 12 * 2 * 32 * 16
    model.requires_grad_(False)
    assert model.flops_per_token(16) == 4 * num_weights + 12 * 2 * 32 * 16
    assert model.num_parameters() == num_weights + 64 * 32
    assert model.num_parameters(trainable=True) == 0
    assert (model.vocab_size, model.max_seq_len) == (VOCAB_SIZE, 64)


def test_only_the_experts_in_use_are_counted() -> None:
    model = tiny_huggingface("mixtral")
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    rest = model.num_parameters() - experts - VOCAB_SIZE * 32
    assert experts == 2 * 4 * 3 * 32 * 48
    assert model.flops_per_token(16) == 6 * (rest + experts // 2) + 12 * 2 * 32 * 16


def test_the_first_step_under_autocast_has_the_gradients_of_the_second() -> None:
    model, batch, grads = tiny_huggingface("llama"), packed_batch(), []
    for _ in range(2):  # in the first one the model is tried without gradients
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss_sum, _ = model(batch)
        loss_sum.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(isinstance(grad, Tensor) and grad.dtype == torch.float32 for grad in grads[0])
    torch.testing.assert_close(grads[0], grads[1])


def test_in_bfloat16_rotary_frequencies_stay_exact() -> None:
    model, exact = tiny_huggingface("llama"), tiny_huggingface("llama").state_dict()
    frequencies = model._base.rotary_emb.inv_freq.clone()
    model.to(torch.bfloat16)
    assert torch.equal(model._base.rotary_emb.inv_freq, frequencies)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.state_dict().keys() == exact.keys()
    loss_sum, _ = model(packed_batch())
    assert loss_sum.dtype == torch.float32


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_steps_do_not_depend_on_the_split_into_micro_batches(family: str) -> None:
    batch, grads = packed_batch(batch_size=4), []
    num_tokens = int((batch["labels"] != IGNORE_INDEX).sum())
    for rows in (4, 1):
        model = tiny_huggingface(family).train()
        for first in range(0, 4, rows):
            some = slice(first, first + rows)
            part = Batch(
                input_ids=batch["input_ids"][some],
                labels=batch["labels"][some],
                document_ids=batch["document_ids"][some],
            )
            (model(part)[0] / num_tokens).backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-6)
