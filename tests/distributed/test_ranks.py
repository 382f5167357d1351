"""Two ranks equal one: the same losses and weights for any place of supervised tokens and any sharding."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import full_tensor, part_of
from llmtrain.evaluation.loss import evaluate_loss
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.models.device_type import assume_device_type
from llmtrain.training.cadence import Late
from llmtrain.training.optimizers import build, build_optimizer
from llmtrain.training.signals import StopRequested
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update
from tests.support.ranks import RankFailed, RankPool
from tests.support.steps import micro_batches, tiny_training
from tests.support.tiny import tiny_decoder
from tests.support.waits import Waits

VOCAB, ROWS, LENGTH = 17, 8, 12
SPLIT: dict[str, Any] = {"d_model": 16, "attention": {"num_heads": 2}}
MUON_TOLERANCE = {True: 2e-3, False: 1e-4}
"""By whether Muon multiplies in bfloat16, where a last bit of a gradient weighs 0.4 %."""


def make_engine(strategy: str = "auto", *, reduce_each: bool | None = None, replicate: int = 1) -> Engine:
    distributed = DistributedConfig.model_validate({"timeout_sec": 60, "strategy": strategy, "replicate": replicate})
    resolved = resolve(RunConfig(device="cpu"), TrainerConfig(precision="32", compile=False), distributed)
    return Engine(replace(resolved, reduce_each_micro_batch=reduce_each), distributed=distributed)


def rows_of(step: int) -> Batch:
    """Eight rows with ever fewer supervised tokens, so that the ranks' counts differ much."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, VOCAB, (ROWS, LENGTH + 1), generator=generator)
    labels = tokens[:, 1:].clone()
    for row in range(ROWS):
        labels[row, LENGTH - row :] = IGNORE_INDEX
    return {"input_ids": tokens[:, :-1].contiguous(), "labels": labels}


class Result(NamedTuple):
    """What training has left on a rank."""

    losses: list[float]
    grad_norms: list[float]
    val_losses: list[float]
    """Before, in the middle and after."""
    weights: list[torch.Tensor]
    """Whole, wherever they lay."""
    local_numel: int
    """Elements of weights on this rank."""


def train(
    strategy: str = "auto",
    *,
    steps: int = 8,
    micro_batch_size: int = 1,
    optimizer: str = "adamw",
    native_bf16: bool = False,
    reduce_each: bool | None = None,
    replicate: int = 1,
    **decoder: Any,
) -> Result:
    """Train on this rank's share of the rows. `native_bf16`: whether the optimizer takes bfloat16 for native."""
    engine = make_engine(strategy, reduce_each=reduce_each, replicate=replicate)
    model, raw = make_model(engine, **decoder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "computes_bf16", lambda device: native_bf16)
        chosen = build_optimizer(OptimizerConfig.model_validate({"name": optimizer, "lr": 0.01}), raw)

    def share(step: int) -> list[Batch]:
        batch, size = rows_of(step), ROWS // engine.data_parallel_size
        mine = slice(engine.data_parallel_rank * size, (engine.data_parallel_rank + 1) * size)
        ids, labels = batch["input_ids"][mine], batch["labels"][mine]
        starts = range(0, size, micro_batch_size)
        return [
            {"input_ids": ids[i : i + micro_batch_size], "labels": labels[i : i + micro_batch_size]} for i in starts
        ]

    def evaluate() -> float:
        return evaluate_loss(model, share(99), engine=engine, tokens_per_byte=None).loss

    losses, norms, val_losses = [], [], [evaluate()]
    for step in range(steps):
        num_tokens = agree(share(step), engine=engine, stop_requested=False).num_tokens
        loss_sum = compute_gradients(model, share(step), engine=engine, num_tokens=num_tokens)
        norm = gradient_norm(chosen)
        update(chosen, grad_norm=norm, max_grad_norm=1.0)
        chosen.zero_grad()
        norms.append(norm.item())
        losses.append(loss_sum.item() / num_tokens)
        if step == steps // 2:
            val_losses.append(evaluate())
    val_losses.append(evaluate())
    weights = [full_tensor(parameter.detach()).clone() for parameter in raw.parameters()]
    return Result(losses, norms, val_losses, weights, sum(part_of(p).local.numel() for p in raw.parameters()))


def make_model(engine: Engine, *, checkpointing: bool = False, **keys: Any) -> tuple[torch.nn.Module, Decoder]:
    torch.manual_seed(0)
    keys = {"d_model": 18, "num_layers": 2, "max_seq_len": LENGTH, "attention": {"num_heads": 3}} | keys
    decoder = Decoder(DecoderConfig.model_validate(keys), VOCAB)
    if checkpointing:
        decoder.checkpoint_blocks()
    return engine.setup(decoder), decoder


def reductions_of_four_micro_batches(reduce_each: bool) -> int:
    engine = make_engine("fsdp", reduce_each=reduce_each)
    model, _ = make_model(engine)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        compute_gradients(model, [rows_of(step) for step in range(4)], engine=engine, num_tokens=1)
    return sum(event.count for event in profiler.key_averages() if event.key == "c10d::alltoall_base_")


def buffer_after_a_forward_pass() -> float:
    engine, raw = make_engine("ddp"), torch.nn.Linear(2, 2)
    raw.register_buffer("table", torch.zeros(()))
    model = engine.setup(raw)
    raw.get_buffer("table").fill_(engine.rank)
    model(torch.ones(1, 2)).sum().backward()
    return raw.get_buffer("table").item()


def logits_after_training() -> tuple[torch.Tensor, torch.Tensor]:
    """What the wrapped model's `logits` gives, twice, with a training step between."""
    engine = make_engine("fsdp")
    model, raw = make_model(engine)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), raw)
    ids = rows_of(0)["input_ids"]
    with torch.no_grad():
        before = model.logits(ids)  # type: ignore[operator]
    compute_gradients(model, [rows_of(0)], engine=engine, num_tokens=1)
    update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=None)
    with torch.no_grad():
        after = model.logits(ids)  # type: ignore[operator]
        loss_sum, _ = model(rows_of(0))
    scores = torch.log_softmax(after, -1)
    labels = rows_of(0)["labels"]
    again = -scores.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORE_INDEX].sum()
    torch.testing.assert_close(loss_sum, again, atol=1e-4, rtol=0)
    return before, after


def norm_with_nan_on_rank_1(strategy: str) -> tuple[float, float]:
    """Loss and gradient norm that each rank sees when the first weight is NaN in rank 1's forward pass alone."""
    engine = make_engine(strategy)
    model, raw = make_model(engine)
    optimizer = build_optimizer(OptimizerConfig(lr=0.01), raw)
    if engine.rank == 1:
        raw.layers()[0].register_forward_hook(lambda module, arguments, output: output * torch.nan)
    loss_sum = compute_gradients(model, [rows_of(0)], engine=engine, num_tokens=1)
    return loss_sum.item(), gradient_norm(optimizer).item()


def waits_for_a_gpu(strategy: str, optimizer: str) -> tuple[dict[str, int], bool]:
    """Return the reads from a GPU besides loss and norm, and whether a step with NaN changed nothing."""
    torch.manual_seed(0)
    raw = tiny_decoder()
    with assume_device_type("cuda"):
        training = tiny_training(raw, strategy=strategy, name=optimizer)
        first, second = micro_batches(0), micro_batches(1)
        training.step(first)
        with Waits() as waits:
            training.step(second)
        chosen = training.learner.optimizer

        def state() -> list[torch.Tensor]:
            tensors = (*raw.parameters(), *chosen.state_tensors().values())
            return [part_of(tensor).local.clone() for tensor in tensors]

        before = state()
        for parameter in chosen.parameters:
            parameter.grad = torch.full_like(parameter, torch.nan)
        update(chosen, grad_norm=gradient_norm(chosen), max_grad_norm=1.0)
    return dict(waits.values), all(map(torch.equal, state(), before))


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


def assert_equal_to_one(ranks: RankPool, strategy: str, *, tolerance: float = 1e-5, **options: Any) -> list[Result]:
    one = train(**{name: value for name, value in options.items() if name != "replicate"})
    results: list[Result] = ranks.run(partial(train, strategy, **options))
    for result in results:
        assert result.losses == pytest.approx(one.losses, abs=tolerance)
        assert result.grad_norms == pytest.approx(one.grad_norms, rel=10 * tolerance)
        assert result.val_losses == pytest.approx(one.val_losses, abs=tolerance)
        for ours, theirs, first in zip(result.weights, one.weights, results[0].weights, strict=True):
            torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)
            assert torch.equal(ours, first), "the ranks' weights have drifted apart"
    return results


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_two_ranks_equal_one_with_unequal_supervised_tokens(
    two_ranks: RankPool, strategy: str, micro_batch_size: int
) -> None:
    assert_equal_to_one(two_ranks, strategy, micro_batch_size=micro_batch_size)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_equal_one_with_unequal_supervised_tokens(four_ranks: RankPool, strategy: str) -> None:
    assert_equal_to_one(four_ranks, strategy)


@pytest.mark.parametrize("options", [{"checkpointing": True}, {"tie_embeddings": False}, {"optimizer": "sgd"}], ids=str)
def test_fsdp_equals_one_rank_with(two_ranks: RankPool, options: dict[str, Any]) -> None:
    assert_equal_to_one(two_ranks, "fsdp", **options)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_two_replicas_of_two_shards_equal_one_rank(four_ranks: RankPool, optimizer: str) -> None:
    tolerance = MUON_TOLERANCE[False] if optimizer == "muon" else 1e-5
    results = assert_equal_to_one(four_ranks, "fsdp", optimizer=optimizer, replicate=2, tolerance=tolerance)
    total = sum(weight.numel() for weight in results[0].weights)
    assert sum(result.local_numel for result in results) == 2 * total


@pytest.mark.slow
def test_two_replicas_whose_ranks_share_each_matrix_equal_one_rank(four_ranks: RankPool) -> None:
    assert_equal_to_one(four_ranks, "fsdp_tp", replicate=2, **SPLIT)


def test_fsdp_shards_every_parameter_over_the_ranks(two_ranks: RankPool) -> None:
    results = two_ranks.run(train, "fsdp")
    total = sum(weight.numel() for weight in results[0].weights)
    assert sum(result.local_numel for result in results) == total
    assert max(result.local_numel for result in results) < 0.55 * total


@pytest.mark.parametrize("native_bf16", [False, True])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_muon_on_two_ranks_is_within_its_tolerance(two_ranks: RankPool, strategy: str, native_bf16: bool) -> None:
    assert_muon_equals_one(two_ranks, strategy, native_bf16=native_bf16)


def test_muon_on_two_ranks_that_share_each_matrix_is_within_its_tolerance(two_ranks: RankPool) -> None:
    assert_muon_equals_one(two_ranks, "fsdp_tp", **SPLIT)


@pytest.mark.slow
def test_muon_on_two_by_two_ranks_is_within_its_tolerance(four_ranks: RankPool) -> None:
    assert_muon_equals_one(four_ranks, "fsdp_tp", **SPLIT)


def assert_muon_equals_one(ranks: RankPool, strategy: str, *, native_bf16: bool = False, **options: Any) -> None:
    tolerance = MUON_TOLERANCE[native_bf16]
    assert_equal_to_one(ranks, strategy, optimizer="muon", native_bf16=native_bf16, tolerance=tolerance, **options)


@pytest.mark.parametrize(("reduce_each", "times"), [(False, 1), (True, 4)])
def test_gradients_are_exchanged_at_the_last_micro_batch_or_at_each(
    two_ranks: RankPool, reduce_each: bool, times: int
) -> None:
    once_for_each_block_and_for_the_rest = 3
    found = two_ranks.run(reductions_of_four_micro_batches, reduce_each)
    assert found == [times * once_for_each_block_and_for_the_rest] * 2


def test_gradients_exchanged_at_each_micro_batch_are_the_same(two_ranks: RankPool) -> None:
    assert_equal_to_one(two_ranks, "fsdp", reduce_each=True)


def test_buffers_are_not_exchanged(two_ranks: RankPool) -> None:
    assert two_ranks.run(buffer_after_a_forward_pass) == [0.0, 1.0]


def test_methods_other_than_forward_work_on_a_sharded_model(two_ranks: RankPool) -> None:
    results = two_ranks.run(logits_after_training)
    (before, after), (others_before, others_after) = results
    assert torch.equal(before, others_before)
    assert torch.equal(after, others_after)
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_nan_on_one_rank_is_seen_by_all(two_ranks: RankPool, strategy: str) -> None:
    for loss_sum, norm in two_ranks.run(norm_with_nan_on_rank_1, strategy):
        assert math.isnan(loss_sum)
        assert math.isnan(norm)


@pytest.mark.parametrize(("strategy", "optimizer"), [("ddp", "adamw"), ("fsdp", "adamw"), ("fsdp", "muon")])
def test_several_ranks_read_from_their_gpus_no_more_than_one(
    two_ranks: RankPool, strategy: str, optimizer: str
) -> None:
    assert two_ranks.run(waits_for_a_gpu, strategy, optimizer) == [({}, True)] * 2


def test_one_rank_that_wants_to_stop_stops_both(two_ranks: RankPool) -> None:
    assert two_ranks.run(stop_on_rank_1) == ["stopped", "stopped"]


def test_a_failure_on_one_rank_is_shown_with_its_traceback(two_ranks: RankPool) -> None:
    with pytest.raises(RankFailed, match="rank 1 has had enough"):
        two_ranks.run(fail_on_rank_1)
