"""The loss of each row for itself: that of its supervised tokens, whatever rows it is computed with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from llmtrain.evaluation import row_loss
from llmtrain.evaluation.row_loss import RowLoss, row_losses
from tests.support.tiny import tiny_decoder
from tests.support.tiny_huggingface import tiny_huggingface

ROWS = [
    ([5, 17, 3, 40], [False, False, True, True]),
    ([9, 1], [False, True]),
    ([1, 2, 3, 4, 5, 6, 7, 8, 9], [True] * 9),
    ([7], [True]),
    ([3, 3, 3], [False] * 3),
    ([], []),
]


@pytest.mark.parametrize("kind", ["decoder", "transformers"])
def test_each_row_has_the_loss_that_it_has_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_decoder() if kind == "decoder" else tiny_huggingface()
    done: list[int] = []
    together = row_losses(model, ROWS, after_batch=done.append)
    assert done == [len(ROWS)]
    for (ids, supervised), found in zip(ROWS, together, strict=True):
        counted = [place for place in range(1, len(ids)) if supervised[place]]
        assert found.num_tokens == len(counted)
        if counted:
            with torch.no_grad():
                logits = model.logits(torch.tensor([ids]))[0]
            wanted = sum(float(F.cross_entropy(logits[place - 1], torch.tensor(ids[place]))) for place in counted)
            assert found.loss_sum == pytest.approx(wanted, rel=1e-5)
    assert together[3:] == [RowLoss(0.0, 0)] * 3, "a first token has nothing that it follows from"
    monkeypatch.setattr(row_loss, "TOKENS_AT_A_TIME", 4)
    alone = row_losses(model, ROWS)
    assert [one.loss_sum for one in alone] == pytest.approx([one.loss_sum for one in together], rel=1e-5)
