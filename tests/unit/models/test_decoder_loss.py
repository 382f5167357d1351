"""The chunked loss is cross-entropy: its value, its gradients, in every precision, with labels left out."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.contracts import IGNORE_INDEX
from llmtrain.models.decoder import loss as loss_module
from llmtrain.models.decoder.loss import next_token_loss
from llmtrain.models.device_type import assume_device_type


def inputs(num_tokens: int = 50, *, width: int = 16, vocab_size: int = 37) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, width, generator=generator)
    weight = torch.randn(vocab_size, width, generator=generator)
    labels = torch.randint(vocab_size, (num_tokens,), generator=generator)
    labels[::3] = IGNORE_INDEX
    return hidden, weight, labels


def value_and_gradients(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, chunked: bool, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = next_token_loss(hidden, weight, labels, chunked=chunked)
    torch.autograd.backward(loss * scale)
    assert hidden.grad is not None
    assert weight.grad is not None
    return loss.detach(), hidden.grad, weight.grad


@pytest.fixture(params=[50, 16, 7], ids=lambda chunk: f"chunks-of-{chunk}")
def chunk_tokens(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Whole, uneven last, many."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS_CPU", request.param)
    return int(request.param)


@pytest.mark.usefixtures("chunk_tokens")
def test_value_and_gradients_equal_plain_cross_entropy() -> None:
    chunked = value_and_gradients(*inputs(), chunked=True)
    plain = value_and_gradients(*inputs(), chunked=False)
    for ours, theirs in zip(chunked, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("chunk_tokens")
def test_a_frozen_weight_gets_no_gradient_and_changes_nothing_else() -> None:
    hidden, weight, labels = inputs()
    loss, hidden_grad, _ = value_and_gradients(hidden, weight, labels, chunked=True)
    again = hidden.clone().requires_grad_()
    with_frozen = next_token_loss(again, weight, labels)
    torch.autograd.backward(with_frozen)
    assert torch.equal(with_frozen.detach(), loss)
    assert again.grad is not None
    assert torch.equal(again.grad, hidden_grad)
    assert weight.grad is None


def test_a_large_vocabulary_has_fewer_tokens_in_a_chunk() -> None:
    tokens = partial(loss_module.chunk_tokens, num_tokens=8192)
    assert tokens(8192, device="cpu") == 1024
    assert tokens(151_936, device="cpu") * 151_936 * 4 <= 128 * 2**20
    assert tokens(151_936, device="cuda") * 151_936 * 4 <= 512 * 2**20


@pytest.mark.parametrize("vocab_size", [61, 50_257, 151_936, 2_000_000])
@pytest.mark.parametrize("num_tokens", [1, 127, 128, 8192, 9000, 32_768, 100_001])
def test_chunks_on_a_gpu_are_equal_multiples_of_128(num_tokens: int, vocab_size: int) -> None:
    size = loss_module.chunk_tokens(vocab_size, device="cuda", num_tokens=num_tokens)
    assert size % 128 == 0
    assert size <= max(128, loss_module.CHUNK_LOGITS_GPU // vocab_size)
    num_chunks = math.ceil(num_tokens / size)
    smallest = min(num_tokens, size) if num_chunks == 1 else num_tokens - (num_chunks - 1) * size
    assert size - smallest < 128 * num_chunks, "no chunk is left with a rest alone"


def test_chunks_of_a_gpu_give_the_same_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, weight, labels = inputs(300)
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS_GPU", 128)
    expected = value_and_gradients(hidden, weight, labels, chunked=False)
    with assume_device_type("cuda"):
        found = value_and_gradients(hidden, weight, labels, chunked=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("vocab_size", "rows"), [(37, 128), (128, 128), (129, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_multiplies_by_a_padded_vocabulary_that_nothing_is_predicted_from(
    vocab_size: int, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, labels = inputs(300, vocab_size=vocab_size)
    hidden[:, 0], weight[:, 0] = 30, -1  # every logit is far below the 0 of a row of zeros
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    expected = value_and_gradients(hidden, weight, labels, chunked=True)
    evaluated = next_token_loss(hidden, weight, labels)
    multiplied: list[int] = []
    kernel = loss_module._chunk_gradients

    def spy(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        multiplied.append(weight.shape[0])
        return kernel(hidden, weight, *rest)

    monkeypatch.setattr(loss_module, "_chunk_gradients", spy)
    with assume_device_type("cuda"):
        found = value_and_gradients(hidden, weight, labels, chunked=True)
        torch.testing.assert_close(next_token_loss(hidden, weight, labels), evaluated)
    assert set(multiplied) == {rows}
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.usefixtures("chunk_tokens")
def test_gradients_are_right_to_float64() -> None:
    hidden, weight, labels = inputs(20, width=5, vocab_size=11)
    doubles = hidden.double().requires_grad_(), weight.double().requires_grad_()

    def reference(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight), labels, ignore_index=IGNORE_INDEX, reduction="sum")

    exact = torch.autograd.grad(reference(*doubles), doubles)
    _, *ours = value_and_gradients(hidden, weight, labels, chunked=True)
    for gradient, wanted in zip(ours, exact, strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("chunk_tokens")
def test_gradients_in_bfloat16_err_at_most_twice_as_much_as_plain_ones() -> None:
    hidden, weight, labels = inputs()
    hidden, weight = hidden.bfloat16(), weight.bfloat16() * 0.3
    truth = value_and_gradients(hidden.float(), weight.float(), labels, chunked=False)
    chunked = value_and_gradients(hidden, weight, labels, chunked=True)
    plain = value_and_gradients(hidden, weight, labels, chunked=False)
    for wanted, ours, theirs in zip(truth, chunked, plain, strict=True):
        error, plain_error = ((value.float() - wanted).norm() / wanted.norm() for value in (ours, theirs))
        assert float(error) < 0.006
        assert float(error) < 2 * float(plain_error) + 1e-5


def test_a_confident_right_prediction_keeps_its_small_gradient_in_bfloat16() -> None:
    """1 - p is far below the spacing of bfloat16 at 1; the gradient must not be rounded to 0 for it."""
    weight = torch.eye(4, dtype=torch.bfloat16) * 8
    hidden, labels = torch.eye(4, dtype=torch.bfloat16)[:1], torch.tensor([0])
    _, hidden_grad, _ = value_and_gradients(hidden, weight, labels, chunked=True)
    _, wanted, _ = value_and_gradients(hidden.float(), weight.float(), labels, chunked=False)
    torch.testing.assert_close(hidden_grad.float(), wanted, rtol=0.01, atol=0)


def test_extreme_logits_give_finite_gradients() -> None:
    weight = torch.tensor([[1e4], [-1e4], [0.0]])
    for label in range(3):
        loss, *gradients = value_and_gradients(torch.ones(1, 1), weight, torch.tensor([label]), chunked=True)
        wanted = value_and_gradients(torch.ones(1, 1), weight, torch.tensor([label]), chunked=False)
        for ours, theirs in zip((loss, *gradients), wanted, strict=True):
            assert torch.isfinite(ours).all()
            torch.testing.assert_close(ours, theirs)


def test_non_finite_hidden_states_show_in_the_loss() -> None:
    hidden, weight, labels = inputs()
    hidden[1, 0] = float("nan")
    assert torch.isnan(next_token_loss(hidden.requires_grad_(), weight, labels))
    assert torch.isnan(next_token_loss(hidden.detach(), weight, labels))


def test_a_factor_on_the_loss_scales_the_gradients() -> None:
    once, thrice = (value_and_gradients(*inputs(), chunked=True, scale=scale) for scale in (1.0, 3.0))
    for single, triple in zip(once[1:], thrice[1:], strict=True):
        torch.testing.assert_close(single * 3, triple)


def test_the_gradients_are_those_of_a_sum_so_that_parts_add_up() -> None:
    hidden, weight, labels = inputs()
    whole = value_and_gradients(hidden, weight, labels, chunked=True)
    halves = [
        value_and_gradients(hidden[part], weight, labels[part], chunked=True) for part in (slice(0, 25), slice(25, 50))
    ]
    torch.testing.assert_close(whole[0], halves[0][0] + halves[1][0])
    torch.testing.assert_close(whole[2], halves[0][2] + halves[1][2])


def test_no_supervised_token_gives_zero_and_no_gradient() -> None:
    hidden, weight, labels = inputs()
    loss, *gradients = value_and_gradients(hidden, weight, torch.full_like(labels, IGNORE_INDEX), chunked=True)
    assert float(loss) == 0.0
    assert all(torch.count_nonzero(gradient) == 0 for gradient in gradients)


@pytest.mark.usefixtures("chunk_tokens")
def test_without_gradients_the_value_is_the_same() -> None:
    hidden, weight, labels = inputs()
    with_gradients, _, _ = value_and_gradients(hidden, weight, labels, chunked=True)
    without = next_token_loss(hidden, weight, labels)
    with torch.no_grad():
        inside = next_token_loss(hidden.requires_grad_(), weight, labels)
    assert not without.requires_grad
    torch.testing.assert_close(without, with_gradients)
    torch.testing.assert_close(inside, with_gradients)


def test_a_frozen_output_weight_still_lets_the_gradient_through() -> None:
    hidden, weight, labels = inputs()
    loss = next_token_loss(hidden.requires_grad_(), weight, labels)
    torch.autograd.backward(loss)
    assert hidden.grad is not None
    assert weight.grad is None


def test_autocast_decides_the_dtype_of_the_products() -> None:
    hidden, weight, labels = inputs()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(hidden, weight, labels)
    torch.autograd.backward(loss)
    assert (loss.dtype, weight.grad.dtype if weight.grad is not None else None) == (torch.float32, torch.float32)
    exact = next_token_loss(hidden, weight.detach(), labels)
    assert loss.item() != float(exact)
    assert float(loss.detach()) == pytest.approx(float(exact), rel=0.01)


def test_in_float16_the_loss_is_chunked_and_equals_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS_CPU", 16)
    plain, rows = loss_module._plain_loss, []

    def counted(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        rows.append(len(hidden))
        return plain(hidden, weight, labels)

    def results(*, chunked: bool) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.float16):
            return value_and_gradients(*inputs(), chunked=chunked, scale=1024.0)

    expected = results(chunked=False)
    monkeypatch.setattr(loss_module, "_plain_loss", counted)
    for ours, theirs in zip(results(chunked=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=2.0)
    assert max(rows) == 16
    assert sum(rows) == 2 * 50, "each chunk is computed once more for its gradients"
