"""Float32 copies of weights in 16 bits, where parameters are sharded over the ranks."""

from __future__ import annotations

import dataclasses

import torch

from llmtrain.config.sections.model import DecoderConfig
from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, OptimizerConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import full_tensor, is_sharded, part_of
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.training.optimizers import NamedOptimizer, build_optimizer
from llmtrain.training.step import compute_gradients
from tests.support.ranks import RankPool
from tests.support.tiny import random_batch

VOCAB = 16
CONFIG = OptimizerConfig(lr=1e-3)


def begin(engine: Engine) -> tuple[torch.nn.Module, Decoder, NamedOptimizer]:
    torch.manual_seed(0)
    shape = {"d_model": 16, "num_layers": 2, "max_seq_len": 64, "attention": {"num_heads": 2}}
    raw = Decoder(DecoderConfig.model_validate(shape), VOCAB).bfloat16()
    return engine.setup(raw), raw, build_optimizer(CONFIG, raw)


def step(model: torch.nn.Module, optimizer: NamedOptimizer, engine: Engine, number: int) -> None:
    compute_gradients(model, [random_batch(VOCAB, seed=number)], engine=engine, num_tokens=100)
    optimizer.step()
    optimizer.zero_grad()


def cut_and_taken_up_again() -> tuple[bool, bool, bool]:
    """Whether the copies are cut, whether weights are what they round to, and whether a resumed run has equal ones."""
    distributed = DistributedConfig(timeout_sec=60)
    trainer = TrainerConfig(precision="32", compile=False)
    resolved = dataclasses.replace(resolve(RunConfig(device="cpu"), trainer, distributed), strategy="fsdp")
    engine = Engine(resolved, distributed=distributed)
    model, raw, optimizer = begin(engine)
    for number in range(3):
        step(model, optimizer, engine, number)
    copies = {name: t for name, t in optimizer.state_tensors().items() if name.endswith("/master")}
    weights = dict(raw.named_parameters())
    rounded = all(
        torch.equal(part_of(weights[name.removesuffix("/master")]).local, part_of(master).local.bfloat16())
        for name, master in copies.items()
    )
    saved = {name: full_tensor(tensor).clone() for name, tensor in optimizer.state_tensors().items()}
    again, other, resumed = begin(engine)
    for name, parameter in other.named_parameters():
        part_of(parameter).local.copy_(part_of(weights[name]).local)
    resumed.load_state_tensors(saved)
    step(model, optimizer, engine, 3)
    step(again, resumed, engine, 3)
    after = resumed.state_tensors()
    equal = all(
        torch.equal(full_tensor(tensor), full_tensor(after[name])) for name, tensor in optimizer.state_tensors().items()
    )
    return all(is_sharded(master) for master in copies.values()) and bool(copies), rounded, equal


def test_copies_are_sharded_with_their_weights_and_restored(two_ranks: RankPool) -> None:
    assert two_ranks.run(cut_and_taken_up_again) == [(True, True, True)] * 2
