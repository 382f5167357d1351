"""One optimizer step: accumulation by tokens, clipping, non-finite losses, and state that is saved by name."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.contracts import IGNORE_INDEX, Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError, WillFailAgain
from llmtrain.training.non_finite import MAX_IN_A_ROW, StepNumbers, judge, leave_out
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.signals import StopRequested
from llmtrain.training.state import LossScale, RunState, seed_step
from llmtrain.training.step import agree, compute_gradients, gradient_norm, update

VOCAB = 11


class Bigrams(nn.Module):
    """The smallest model that meets the contract: an embedding, a block with a matrix, an output projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8)])
        self.head = nn.Linear(8, VOCAB, bias=False)

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        hidden = self.blocks[0](self.embedding(batch["input_ids"])).tanh()
        logits, labels = self.head(hidden).flatten(0, 1), batch["labels"].flatten()
        loss_sum = nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        return loss_sum, (labels != IGNORE_INDEX).sum()


@pytest.fixture(scope="module")
def engine() -> Engine:
    trainer = TrainerConfig(precision="32", compile=False)
    resolved = resolve(RunConfig(device="cpu"), trainer, DistributedConfig())
    return Engine(resolved, distributed=DistributedConfig())


def make(engine: Engine, name: str = "adamw") -> tuple[nn.Module, NamedOptimizer]:
    torch.manual_seed(0)
    raw = Bigrams()
    model = engine.setup(raw)
    return model, build_optimizer(OptimizerConfig.model_validate({"name": name, "lr": 0.01}), raw)


def batch_of(rows: int, *, seed: int = 0, supervised: float = 0.6) -> Batch:
    """Rows with unequal numbers of supervised tokens, the first with few."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (rows, 7), generator=generator)
    labels = torch.randint(0, VOCAB, (rows, 7), generator=generator)
    labels[torch.rand(rows, 7, generator=generator) > supervised] = IGNORE_INDEX
    labels[0, 1:] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def gradients(model: nn.Module, batches: list[Batch], *, engine: Engine, loss_scale: float = 1.0) -> tuple[float, int]:
    """As the loop has them: the sum of the losses and the number of tokens, the gradients in the parameters."""
    num_tokens = agree(batches, engine=engine, stop_requested=False).num_tokens
    loss_sum = compute_gradients(model, batches, engine=engine, num_tokens=num_tokens, loss_scale=loss_scale)
    return loss_sum.item(), num_tokens


def split(batch: Batch, size: int) -> list[Batch]:
    rows = len(batch["labels"])
    return [
        {"input_ids": batch["input_ids"][i : i + size], "labels": batch["labels"][i : i + size]}
        for i in range(0, rows, size)
    ]


def train(engine: Engine, size: int, *, steps: int = 10) -> tuple[list[float], nn.Module]:
    model, optimizer = make(engine)
    losses = []
    for step in range(steps):
        loss_sum, num_tokens = gradients(model, split(batch_of(16, seed=step), size), engine=engine)
        update(optimizer, grad_norm=gradient_norm(optimizer), max_grad_norm=1.0)
        optimizer.zero_grad()
        losses.append(loss_sum / num_tokens)
    return losses, model


@pytest.mark.parametrize("size", [1, 3, 8])
def test_16_by_1_equals_1_by_16_with_unequal_supervised_tokens(engine: Engine, size: int) -> None:
    whole, whole_model = train(engine, 16)
    parts, parts_model = train(engine, size)
    assert parts == pytest.approx(whole, abs=1e-6)
    for a, b in zip(whole_model.parameters(), parts_model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_loss_is_weighted_by_token_and_not_by_batch(engine: Engine) -> None:
    model, _ = make(engine)
    batch = batch_of(4)
    loss_sum, num_tokens = gradients(model, split(batch, 1), engine=engine)
    expected_sum, expected_tokens = model(batch)
    assert num_tokens == int(expected_tokens)
    assert loss_sum == pytest.approx(expected_sum.item(), rel=1e-6)


def test_a_micro_batch_without_a_supervised_token_changes_nothing(engine: Engine) -> None:
    model, optimizer = make(engine)
    batch = batch_of(4)
    gradients(model, [batch], engine=engine)
    expected = [p.grad.clone() for p in optimizer.parameters if p.grad is not None]
    optimizer.zero_grad()
    silent: Batch = {"input_ids": batch["input_ids"], "labels": torch.full_like(batch["labels"], IGNORE_INDEX)}
    gradients(model, [batch, silent], engine=engine)
    for before, parameter in zip(expected, optimizer.parameters, strict=True):
        assert parameter.grad is not None
        assert torch.equal(before, parameter.grad)


def test_clipping_scales_the_whole_gradient_to_the_norm(engine: Engine) -> None:
    model, optimizer = make(engine)
    gradients(model, [batch_of(4)], engine=engine)
    expected = torch.cat([p.grad.flatten() for p in optimizer.parameters if p.grad is not None]).norm().item()
    norm = gradient_norm(optimizer)
    assert norm.item() == pytest.approx(expected, rel=1e-5)
    seen: list[float] = []
    optimizer.step = lambda finite: seen.append(gradient_norm(optimizer).item())  # type: ignore[assignment, misc]
    update(optimizer, grad_norm=norm, max_grad_norm=expected / 4)
    assert seen == pytest.approx([expected / 4], rel=1e-5)


BAD = StepNumbers(step=7, loss=math.nan, grad_norm=1.0, items=range(96, 112))


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_what_is_not_finite_stops_the_run_with_42_and_names_the_sequences(loss: float, norm: float) -> None:
    with pytest.raises(WillFailAgain, match=r"step 7: .*sequences 96 to 111.*optimizer\.lr") as raised:
        judge(BAD._replace(loss=loss, grad_norm=norm), RunState(), policy="stop")
    assert raised.value.exit_code == 42


def test_skipping_ends_when_it_does_not_help() -> None:
    state = RunState()
    for _ in range(MAX_IN_A_ROW - 1):
        judge(BAD, state, policy="skip")
    judge(BAD._replace(loss=1.0), state, policy="skip")
    for _ in range(MAX_IN_A_ROW - 1):
        judge(BAD, state, policy="skip")
    assert state.skipped_steps == 2 * (MAX_IN_A_ROW - 1)
    with pytest.raises(WillFailAgain, match="It is not the data"):
        judge(BAD, state, policy="skip")


@pytest.mark.parametrize(("step", "saved_at"), [(2, 0), (1, 1000)])
def test_rolling_back_ends_when_it_does_not_help(step: int, saved_at: int) -> None:
    """Ten times to one checkpoint; or ten steps on end, however the run was saved in between."""
    state = RunState(item=saved_at, left_out=[(0, 1), (2000, 2001)])
    for start in range(50, 50 + step * (MAX_IN_A_ROW - 3), step):
        leave_out(state, BAD._replace(items=range(start, start + 1)))
    assert state.leaves_out(range(40, 51))
    assert not state.leaves_out(range(1, 50))
    with pytest.raises(WillFailAgain, match="It is not the data"):  # noqa: PT012  # one of the last three
        for start in range(50 + step * (MAX_IN_A_ROW - 3), 50 + step * MAX_IN_A_ROW, step):
            leave_out(state, BAD._replace(items=range(start, start + 1)))


def test_an_overflow_halves_the_loss_scale_and_is_no_event_until_the_scale_is_1() -> None:
    state = RunState(loss_scale=LossScale(value=4.0, good_steps=1999))
    overflow = BAD._replace(loss=2.0, grad_norm=math.inf)
    judge(overflow._replace(grad_norm=1.0), state, policy="stop")
    assert state.loss_scale == LossScale(value=8.0)
    for value in (4.0, 2.0, 1.0):
        judge(overflow, state, policy="stop")
        assert state.loss_scale == LossScale(value=value)
    with pytest.raises(WillFailAgain):
        judge(overflow, state, policy="stop")
    assert state.skipped_steps == 0
    assert RunState.from_dict(json.loads(json.dumps(state.as_dict()))) == state


def test_a_loss_scale_leaves_the_update_as_it_is(engine: Engine) -> None:
    weights = []
    for scale in (1.0, 1024.0):
        model, optimizer = make(engine)
        gradients(model, [batch_of(4)], engine=engine, loss_scale=scale)
        norm = gradient_norm(optimizer) / scale
        update(optimizer, grad_norm=norm, max_grad_norm=0.01, loss_scale=scale)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(weights[0], weights[1])  # a power of two


def test_a_wish_to_stop_computes_nothing(engine: Engine) -> None:
    with pytest.raises(StopRequested):
        agree([batch_of(4)], engine=engine, stop_requested=True)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd", "muon"])
def test_optimizer_state_saved_by_name_gives_the_same_next_step(engine: Engine, name: str) -> None:
    model, optimizer = make(engine, name)
    gradients(model, [batch_of(4)], engine=engine)
    optimizer.step()
    optimizer.zero_grad()
    saved = {key: value.clone() for key, value in optimizer.state_tensors().items()}
    weights = {key: value.clone() for key, value in model.state_dict().items()}

    other_model, other = make(engine, name)
    other_model.load_state_dict(weights)
    other.load_state_tensors(saved)
    for each_model, each in ((model, optimizer), (other_model, other)):
        gradients(each_model, [batch_of(4, seed=9)], engine=engine)
        each.step()
    for a, b in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(engine: Engine) -> None:
    _, optimizer = make(engine, "muon")
    optimizer.set_lr_scale(1.0)
    for parameter in optimizer.parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    kinds = {key.rpartition("/")[0]: key.rpartition("/")[2] for key in optimizer.state_tensors() if "step" not in key}
    assert kinds["blocks.0.weight"] == "momentum_buffer"
    assert {kind for name, kind in kinds.items() if name != "blocks.0.weight"} == {"exp_avg_sq"}


def test_weight_decay_spares_embeddings_norms_and_biases(engine: Engine) -> None:
    model, optimizer = make(engine)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for parameter in optimizer.parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    changed = {
        name.rpartition("module.")[2] for name, p in model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"blocks.0.weight", "head.weight"}


def test_adam_and_sgd_add_the_decay_to_the_gradient(engine: Engine) -> None:
    for name in ("adam", "sgd"):
        model, _ = make(engine)
        config = OptimizerConfig.model_validate({"name": name, "lr": 0.01, "momentum": 0.0, "weight_decay": 0.5})
        optimizer = build_optimizer(config, model)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        for parameter in optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        for key, after in model.named_parameters():
            if key.endswith("blocks.0.weight"):
                # adam divides the gradient by its own size; sgd takes it as it is
                step = 0.01 * before[key].sign() if name == "adam" else 0.01 * 0.5 * before[key]
                torch.testing.assert_close(after.detach(), before[key] - step, rtol=1e-4, atol=1e-5)
            elif key.endswith("blocks.0.bias"):
                assert torch.equal(after, before[key])


def test_sgd_without_momentum_has_no_state_to_lose(engine: Engine) -> None:
    model, _ = make(engine)
    optimizer = build_optimizer(OptimizerConfig(name="sgd", momentum=0.0), model)
    gradients(model, [batch_of(4)], engine=engine)
    optimizer.step()
    assert optimizer.state_tensors() == {}
    optimizer.load_state_tensors({})


def test_state_of_another_optimizer_or_model_is_rejected(engine: Engine) -> None:
    _, muon = make(engine, "muon")
    for parameter in muon.parameters:
        parameter.grad = torch.ones_like(parameter)
    muon.step()
    _, adamw = make(engine)
    with pytest.raises(
        ConfigError, match=r"has \['momentum_buffer'\], but .* has \['exp_avg', .*: resume with the optimizer"
    ):
        adamw.load_state_tensors(muon.state_tensors())
    with pytest.raises(ConfigError, match=r"state for other\.weight, which this model does not train"):
        adamw.load_state_tensors({"other.weight/exp_avg": torch.zeros(1)})


def test_random_numbers_are_a_function_of_seed_step_and_rank() -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        seed_step(seed, step, rank)
        return torch.rand(()).item()

    first = draw(1, 5, 0)
    draw(1, 6, 0)
    assert draw(1, 5, 0) == first
    assert len({first, draw(2, 5, 0), draw(1, 4, 0), draw(1, 5, 1), draw(1, -1, 0)}) == 5
