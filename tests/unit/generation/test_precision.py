"""Precision of texts and evaluations: bfloat16 on a GPU that has it, on a CPU that of the weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from llmtrain.distributed.sharding import without_gradients
from llmtrain.generation import precision
from llmtrain.generation.precision import autocast_dtype, computing_in, named_precision
from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config, tiny_decoder

CPU, GPU = torch.device("cpu"), torch.device("cuda")
PRODUCTS = {getattr(torch.ops.aten, name).default for name in ("linear", "mm", "addmm")}
"""Products with a weight. Those within attention are the kernel's own."""


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this machine claim to have a GPU with bfloat16, and tensors to be there."""
    monkeypatch.setattr(precision, "has_native_bf16", lambda _: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        yield


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the dtypes of matrix products, of what is cast to bfloat16, and the float32 settings that they meet."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: Counter[torch.dtype] = Counter()
        self.settings: set[str] = set()
        self.casts: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS:
            self.dtypes[args[1].dtype] += 1
            self.settings.add(torch.get_float32_matmul_precision())
        elif func == torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.casts[tuple(args[0].shape)] += 1
        return func(*args, **(kwargs or {}))


def logits_of(decoder: Decoder, dtype: torch.dtype | None, *, times: int = 1) -> tuple[Tensor, Products]:
    ids = torch.zeros(2, 8, dtype=torch.long, device=decoder.device)
    with computing_in(dtype, decoder.device), without_gradients(decoder), Products() as products:
        for _ in range(times):
            logits = decoder.logits(ids)
    return logits, products


@pytest.mark.usefixtures("with_gpu")
def test_a_gpu_multiplies_in_bfloat16_and_rounds_each_weight_once() -> None:
    with GPU:
        decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE).eval()
    assert autocast_dtype(GPU) == torch.bfloat16
    logits, products = logits_of(decoder, autocast_dtype(GPU), times=3)
    assert logits.dtype == torch.bfloat16
    assert set(products.dtypes) == {torch.bfloat16}
    (table,) = {tuple(decoder.output_weight.shape)}
    assert products.casts[table] == 1, "of three forward passes"
    assert torch.get_float32_matmul_precision() == "highest", "as before"
    assert named_precision(decoder, torch.bfloat16, GPU) == "bfloat16 (autocast)"


@pytest.mark.usefixtures("with_gpu")
def test_float32_that_was_asked_for_takes_tf32() -> None:
    with GPU:
        decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE).eval()
    assert autocast_dtype(GPU, "32") is None
    logits, products = logits_of(decoder, None)
    assert (logits.dtype, set(products.dtypes), products.settings) == (torch.float32, {torch.float32}, {"high"})
    assert torch.get_float32_matmul_precision() == "highest"
    assert named_precision(decoder, None, GPU) == "float32, products in TF32"


def test_a_gpu_without_bfloat16_and_every_cpu_keep_the_dtype_of_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "has_native_bf16", lambda device: device == "cpu")
    assert autocast_dtype(GPU) is None
    assert autocast_dtype(CPU) is None
    assert autocast_dtype(CPU, "bf16-mixed") is None
    decoder = tiny_decoder()
    assert named_precision(decoder, None, GPU) == "float32"
    logits, products = logits_of(decoder, None)
    assert (logits.dtype, products.settings) == (torch.float32, {"highest"})
    assert torch.equal(logits, decoder.logits(torch.zeros(2, 8, dtype=torch.long)))
    assert named_precision(decoder.bfloat16(), None, CPU) == "bfloat16"
