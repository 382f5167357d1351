"""The loss over an output layer with a bias holds the logits of one chunk at a time, in float16 as well."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.models.decoder import loss as loss_module
from llmtrain.models.huggingface.head import Head


def test_in_float16_the_loss_is_chunked_and_equals_plain_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS_CPU", 16)
    torch.manual_seed(0)
    linear, rows = nn.Linear(16, 37), []
    linear.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    hidden, labels = torch.randn(50, 16), torch.randint(37, (50,))

    def results(*, chunked: bool) -> tuple[Tensor, ...]:
        leaf = hidden.clone().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            if chunked:
                loss = Head(linear).loss(leaf, labels)
            else:
                loss = F.cross_entropy(linear(leaf).float(), labels, reduction="sum")
        torch.autograd.backward(loss * 1024)
        return loss.detach(), *(tensor.grad.clone() for tensor in (leaf, linear.weight, linear.bias))  # type: ignore[union-attr]

    expected = results(chunked=False)
    rows.clear()
    for ours, theirs in zip(results(chunked=True), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-3, atol=2.0)
    assert max(rows) == 16
    assert sum(rows) == 2 * 50, "each chunk is computed once more for its gradients"
