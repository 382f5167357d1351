"""The decoder's code for a GPU, on tensors that claim to be on one: which kernels its attention may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.nn.attention import SDPBackend, sdpa_kernel

from llmtrain.config.sections.lora import LoraConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import Resolved
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.device_type import assume_device_type
from llmtrain.models.lora import add_lora_to_decoder
from llmtrain.training.optimizers import build_optimizer
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config, tiny_decoder


def cudnn_is_on() -> bool:
    return bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]


@pytest.fixture(autouse=True)
def _kernels_as_before() -> Iterator[None]:
    before = cudnn_is_on()
    torch.backends.cuda.enable_cudnn_sdp(False)  # as the engine leaves it on a GPU
    yield
    torch.backends.cuda.enable_cudnn_sdp(before)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, bool]]:
    """For each fused attention: there is a mask, cuDNN may compute it."""
    real: Callable[..., Tensor] = F.scaled_dot_product_attention
    found: list[tuple[bool, bool]] = []

    def spy(*tensors: Tensor, attn_mask: Tensor | None, **options: Any) -> Tensor:
        found.append((attn_mask is not None, cudnn_is_on()))
        with sdpa_kernel(SDPBackend.MATH):  # the choice among the others asks the GPU
            return real(*tensors, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return found


@pytest.mark.parametrize(
    ("config", "length", "with_documents", "expected"),
    [
        ({}, 128, False, (False, True)),
        ({"positional": {"encoding": "learned"}}, 256, False, (False, True)),
        ({"attention": {"variant": "complex"}}, 128, False, (False, True)),
        ({}, 192, False, (False, False)),  # each new length would be planned
        ({}, 192, True, (True, False)),
        ({}, 128, True, (True, False)),
        ({"attention": {"mask": "sliding_window", "window": 8}}, 128, False, (True, False)),
        ({"positional": {"encoding": "alibi"}}, 128, False, (True, False)),
    ],
)
def test_cudnn_computes_only_causal_attention_without_a_mask(
    config: dict[str, Any],
    length: int,
    with_documents: bool,
    expected: tuple[bool, bool],
    calls: list[tuple[bool, bool]],
) -> None:
    with FakeTensorMode(), torch.device("cuda"):
        decoder = Decoder(tiny_config(max_seq_len=256, **config), TINY_VOCAB_SIZE)
        ids = torch.zeros(2, length, dtype=torch.long)
        decoder.logits(ids, document_ids=ids if with_documents else None)
    assert calls == [expected] * len(decoder.layers())
    assert not cudnn_is_on(), "off again"


def test_without_gradients_lengths_are_many_and_cudnn_plans_none(calls: list[tuple[bool, bool]]) -> None:
    with FakeTensorMode(), torch.device("cuda"), torch.no_grad():
        Decoder(tiny_config(max_seq_len=256), TINY_VOCAB_SIZE).logits(torch.zeros(2, 128, dtype=torch.long))
    assert set(calls) == {(False, False)}


def test_compiled_blocks_choose_as_eager_ones_do() -> None:
    eager, compiled = tiny_decoder(max_seq_len=128).train(), tiny_decoder(max_seq_len=128).train()
    batch = random_batch(seq_len=128)
    with assume_device_type("cuda"):
        compiled.compile_parts(backend="aot_eager")
        torch.testing.assert_close(compiled(batch)[0], eager(batch)[0])


def test_an_engine_on_a_gpu_turns_cudnn_s_kernel_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:64")  # else the engine would set it for all tests
    torch.backends.cuda.enable_cudnn_sdp(True)
    resolved = Resolved(device="cuda", precision="32", compile=False, strategy="single", backend="nccl", because="one")
    with suppress(RuntimeError):  # Fabric's, where there is no GPU
        Engine(resolved, distributed=DistributedConfig())
    assert not cudnn_is_on()


ENCODINGS: dict[str, dict[str, Any]] = {
    "rope": {"encoding": "rope"},
    "scaled rope": {"encoding": "rope", "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "learned": {"encoding": "learned"},
    "sinusoidal": {"encoding": "sinusoidal"},
    "alibi": {"encoding": "alibi"},
    "none": {"encoding": "none"},
}


@pytest.fixture
def on_gpu() -> Iterator[None]:
    """Let tensors that are moved to a GPU claim to be there. An operator on two devices raises, and so does a wait."""
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):  # the choice among kernels asks the GPU
        yield


def decoder_on_gpu(*, lora: dict[str, Any] | None = None, **changes: Any) -> Decoder:
    with unset_fake_temporarily():
        decoder = Decoder(tiny_config(**changes), TINY_VOCAB_SIZE)
        if lora:
            add_lora_to_decoder(decoder, LoraConfig.model_validate(lora))

    def move(tensor: Tensor) -> Tensor:
        """As `.to("cuda")`, without an operator that would meet the values on the CPU."""
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")

    moved: Decoder = decoder._apply(move)  # type: ignore[no-untyped-call]
    return moved


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("positional", ENCODINGS.values(), ids=ENCODINGS)
@pytest.mark.parametrize("lora", [None, {"r": 2}], ids=["full", "lora"])
def test_forward_and_update_leave_no_tensor_on_the_cpu_and_wait_for_none(
    positional: dict[str, Any], lora: dict[str, Any] | None
) -> None:
    """Not the backward pass, which asks for the GPU's context."""
    decoder = decoder_on_gpu(positional=positional, lora=lora).train()
    optimizer = build_optimizer(OptimizerConfig(), decoder, bf16=True)
    batch: dict[str, Any] = {**random_batch(num_documents=2)}
    loss_sum, count = decoder({name: value.to("cuda") for name, value in batch.items()})
    assert (loss_sum.device.type, count.device.type) == ("cuda", "cuda")
    for parameter in decoder.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    assert {state.device.type for state in optimizer.state_tensors().values() if state.ndim} == {"cuda"}


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("positional", ENCODINGS.values(), ids=ENCODINGS)
def test_cached_decoding_leaves_no_tensor_on_the_cpu(positional: dict[str, Any]) -> None:
    decoder = decoder_on_gpu(positional=positional).eval()
    with torch.no_grad():
        cache = decoder.new_cache(2, 16)
        for length in (5, 1):
            ids = torch.zeros(2, length, dtype=torch.long, device="cuda")
            logits = decoder.logits(ids, cache=cache, last_only=True)
    assert logits.device.type == "cuda"
    assert logits.shape == (2, 1, TINY_VOCAB_SIZE)
