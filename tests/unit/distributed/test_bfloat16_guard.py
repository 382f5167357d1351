"""The guard against products in bfloat16 sees each kind of them, in each place where one may be computed."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd

from tests.support.bfloat16 import BFloat16Product, count_bfloat16_products, no_bfloat16_products

NARROW = torch.ones(4, 8, dtype=torch.bfloat16)
WIDE = torch.ones(4, 8)


def autocast(compute: Callable[[], Tensor]) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return compute()


def in_inference(compute: Callable[[], Tensor]) -> Tensor:
    with torch.inference_mode():
        return compute()


PRODUCTS: dict[str, Callable[[], Tensor]] = {
    "matmul": lambda: NARROW @ NARROW.t(),
    "batched": lambda: NARROW.expand(2, 4, 8) @ NARROW.t(),
    "vector": lambda: NARROW @ NARROW[0],
    "dot": lambda: NARROW[0] @ NARROW[0],
    "linear": lambda: F.linear(NARROW, NARROW),
    "linear with a bias": lambda: F.linear(NARROW, NARROW, NARROW[0, :4]),
    "einsum": lambda: torch.einsum("ab,cb->ac", NARROW, NARROW),
    "attention": lambda: F.scaled_dot_product_attention(NARROW[None, None], NARROW[None, None], NARROW[None, None]),
    "convolution": lambda: F.conv1d(NARROW[None], NARROW[:, :, None].transpose(0, 1)[:, :4]),
    "inference": lambda: in_inference(lambda: F.linear(NARROW, NARROW)),
    "attention in inference": lambda: in_inference(
        lambda: F.scaled_dot_product_attention(NARROW[None, None], NARROW[None, None], NARROW[None, None])
    ),
    "autocast": lambda: autocast(lambda: WIDE @ WIDE.t()),
    "autocast in inference": lambda: in_inference(lambda: autocast(lambda: F.linear(WIDE, WIDE))),
    "muon of torch": lambda: torch.optim._muon._zeropower_via_newtonschulz(WIDE, (3.4, -4.8, 2.0), 5, 1e-7),
}


@pytest.mark.parametrize("kind", list(PRODUCTS))
def test_a_product_in_bfloat16_fails(kind: str) -> None:
    with pytest.raises(BFloat16Product), no_bfloat16_products():
        PRODUCTS[kind]()


def test_products_in_float32_and_sums_in_bfloat16_pass() -> None:
    with no_bfloat16_products():
        weight = WIDE.clone().requires_grad_()
        x = F.linear(WIDE, weight)[None, None]
        F.scaled_dot_product_attention(x, x, x).sum().backward()  # type: ignore[no-untyped-call]
        (NARROW + NARROW.exp()).sum()
        with torch.device("meta"):
            F.linear(torch.ones(4, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16))


class OnlyBackward(torch.autograd.Function):
    """Multiplies in bfloat16 when the gradient is computed, and not before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return (grads[0].bfloat16() @ torch.eye(8, dtype=torch.bfloat16)).float()


def test_a_bfloat16_product_in_the_backward_pass_fails() -> None:
    x = WIDE.clone().requires_grad_()
    with pytest.raises(BFloat16Product), no_bfloat16_products():
        OnlyBackward.apply(x).sum().backward()  # type: ignore[no-untyped-call]
    weight = NARROW.clone().requires_grad_()
    product = F.linear(NARROW, weight).sum()
    with pytest.raises(BFloat16Product), no_bfloat16_products():
        product.backward()  # type: ignore[no-untyped-call]


def test_a_bfloat16_product_in_an_optimizer_step_fails() -> None:
    weight = nn.Parameter(torch.randn(4, 8))
    weight.grad = torch.randn(4, 8)
    with pytest.raises(BFloat16Product), no_bfloat16_products():
        torch.optim.Muon([weight]).step()  # type: ignore[no-untyped-call]


def test_a_product_whose_error_is_caught_fails_at_the_end_of_the_block() -> None:
    def multiply_and_go_on() -> None:
        with no_bfloat16_products(), contextlib.suppress(BFloat16Product):
            PRODUCTS["matmul"]()

    with pytest.raises(BFloat16Product, match="1 matrix products in bfloat16"):
        multiply_and_go_on()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_bfloat16_product_in_another_thread_fails() -> None:
    def multiply_in_a_thread() -> None:
        with no_bfloat16_products():
            thread = threading.Thread(target=PRODUCTS["matmul"])
            thread.start()
            thread.join()

    with pytest.raises(BFloat16Product):
        multiply_in_a_thread()


@pytest.mark.parametrize(("narrow", "count"), [(True, 3), (False, 0)])
def test_a_bfloat16_product_in_a_compiled_graph_fails(narrow: bool, count: int) -> None:
    found = []

    def look(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        found.append(count_bfloat16_products(graph))
        return graph

    backend = aot_autograd(fw_compiler=look, bw_compiler=look)
    layer = torch.compile(nn.Linear(8, 4), backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=narrow):
        out = layer(WIDE.clone().requires_grad_())
    out.float().sum().backward()
    assert sum(found) == count
