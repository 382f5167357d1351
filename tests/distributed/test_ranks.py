"""Two ranks equal one: the same losses and weights, however the supervised tokens lie."""

import pytest
import torch

from llmtrain.config.model import AttentionConfig, DecoderConfig
from llmtrain.config.running import RunConfig
from llmtrain.config.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.engine import Engine, resolve
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.testing.ranks import RankFailed, RankPool
from llmtrain.training.cadence import Late
from llmtrain.training.optimizers import build_optimizer
from llmtrain.training.signals import StopRequested
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update

VOCAB, ROWS, LENGTH = 17, 8, 12


def make_engine() -> Engine:
    distributed = DistributedConfig(timeout_sec=60)
    trainer = TrainerConfig(precision="32", compile=False)
    return Engine(resolve(RunConfig(device="cpu"), trainer, distributed), distributed=distributed)


def rows_of(step: int) -> Batch:
    """Eight rows with ever fewer supervised tokens, so that the ranks' counts differ much."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, LENGTH - row :] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}


def train(steps: int, micro_batch_size: int) -> tuple[list[float], float, list[torch.Tensor]]:
    """Losses, validation loss and weights after `steps` steps on this rank's share of the rows."""
    engine = make_engine()
    torch.manual_seed(0)
    config = DecoderConfig(d_model=16, num_layers=2, max_seq_len=LENGTH, attention=AttentionConfig(num_heads=2))
    decoder = Decoder(config, VOCAB)
    model = engine.setup(decoder)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), decoder)

    def share(step: int) -> list[Batch]:
        batch, size = rows_of(step), ROWS // engine.world_size
        mine = slice(engine.rank * size, (engine.rank + 1) * size)
        ids, labels = batch["input_ids"][mine], batch["labels"][mine]
        starts = range(0, size, micro_batch_size)
        return [
            {"input_ids": ids[i : i + micro_batch_size], "labels": labels[i : i + micro_batch_size]} for i in starts
        ]

    losses = []
    for step in range(steps):
        num_tokens, _ = agree(share(step), engine=engine, stop_requested=False)
        loss_sum = compute_gradients(model, share(step), engine=engine, num_tokens=num_tokens)
        update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss_sum / num_tokens)
    result = evaluate_loss(model, share(99), engine=engine, tokens_per_byte=None)
    return losses, result.loss, [parameter.detach().clone() for parameter in decoder.parameters()]


def stop_on_rank_1() -> str:
    engine = make_engine()
    try:
        agree([], engine=engine, stop_requested=engine.rank == 1)
    except StopRequested:
        return "stopped"
    return "went on"


def late_by_the_main_clock() -> tuple[bool, bool]:
    engine = make_engine()
    return agree([], engine=engine, stop_requested=False, late=Late(evaluation=False, save=engine.is_main)).late


def fail_on_rank_1() -> int:
    if make_engine().rank == 1:
        raise ValueError("rank 1 has had enough")
    return 0


def test_what_is_due_by_the_main_process_s_clock_is_due_on_all_ranks(two_ranks: RankPool) -> None:
    assert two_ranks.run(late_by_the_main_clock) == [(False, True), (False, True)]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_two_ranks_equal_one_with_unequal_supervised_tokens(two_ranks: RankPool, micro_batch_size: int) -> None:
    one_losses, one_val, one_weights = train(8, micro_batch_size)
    results = two_ranks.run(train, 8, micro_batch_size)
    for losses, val, weights in results:
        assert losses == pytest.approx(one_losses, abs=1e-5)
        assert val == pytest.approx(one_val, abs=1e-5)
        for a, b in zip(weights, one_weights, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    for a, b in zip(results[0][2], results[1][2], strict=True):
        assert torch.equal(a, b), "the ranks' weights have drifted apart"


def test_one_rank_that_wants_to_stop_stops_both(two_ranks: RankPool) -> None:
    assert two_ranks.run(stop_on_rank_1) == ["stopped", "stopped"]


def test_a_failure_on_one_rank_is_shown_with_its_traceback(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match="rank 1 has had enough"):
        two_ranks.run(fail_on_rank_1)
