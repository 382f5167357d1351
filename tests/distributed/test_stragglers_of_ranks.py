"""Under fsdp a rank's own work is timed without its waits for the others, which every layer has.

What takes a rank's time here are pauses, at places where nothing is exchanged, so the figures hold on a busy machine.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from logging.handlers import BufferingHandler
from typing import Literal

import pytest
from torch import Tensor, nn

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.contracts import Batch
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.distributed.sharding import parameter_groups
from llmtrain.models.decoder.decoder import Decoder
from llmtrain.training.step import compute_gradients
from llmtrain.training.stragglers import EVERY_STEPS, StragglerWatch
from tests.support.ranks import RankPool
from tests.support.tiny import TINY_VOCAB_SIZE, random_batch, tiny_config

Place = Literal["data", "forward", "backward"]


def messages_of_a_run(pauses: Mapping[int, tuple[Place, float]], steps: int) -> list[str]:
    """What is logged while rank R pauses `pauses[R]`: where, and for how many seconds of each micro-batch."""
    distributed = DistributedConfig.model_validate({"timeout_sec": 60, "strategy": "fsdp"})
    trainer = TrainerConfig(precision="32", compile=False)
    engine = Engine(resolve(RunConfig(device="cpu"), trainer, distributed), distributed=distributed)
    decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE)
    model = engine.setup(decoder)
    place, seconds = pauses[engine.rank]
    if place != "data":
        inner = next(module for module in decoder.layers()[1].modules() if isinstance(module, nn.Linear))
        inner.register_forward_hook(_pausing(place, seconds))
    heard = BufferingHandler(capacity=100)
    logger = logging.getLogger("llmtrain.stragglers")
    logger.addHandler(heard)
    batch: Batch = random_batch(batch_size=2, seq_len=8)
    stragglers = StragglerWatch(model, engine=engine)
    try:
        for step in range(1, steps + 1):
            began = time.perf_counter()
            if place == "data":
                time.sleep(2 * seconds)
            waited_sec = time.perf_counter() - began
            engine.sum(1)
            with stragglers.computing():
                compute_gradients(model, [batch, batch], engine=engine, num_tokens=32)
            stragglers.stepped(step, waited_sec=waited_sec, seconds=time.perf_counter() - began)
    finally:
        logger.removeHandler(heard)
    assert not any(
        "wait_for_unshard" in vars(group) for group in parameter_groups(model)
    )  # the timing has left nothing
    return [record.getMessage() for record in heard.buffer]


def _pausing(place: Place, seconds: float) -> Callable[[nn.Module, object, Tensor], None]:
    def hook(module: nn.Module, arguments: object, output: Tensor) -> None:
        if place == "forward":
            time.sleep(seconds)
        else:
            output.register_hook(lambda _: time.sleep(seconds))  # type: ignore[no-untyped-call]

    return hook


@pytest.mark.parametrize("place", ["data", "forward", "backward"])
def test_under_fsdp_a_slow_rank_is_named_wherever_it_loses_its_time(two_ranks: RankPool, place: Place) -> None:
    pauses: dict[int, tuple[Place, float]] = {0: ("forward", 0.01), 1: (place, 0.08)}
    for heard in two_ranks.run(messages_of_a_run, pauses, 2 * EVERY_STEPS):
        assert len(heard) == 1, heard
        assert heard[0].startswith("rank 1 on ")


def test_under_fsdp_no_rank_is_named_where_all_lose_as_much(two_ranks: RankPool) -> None:
    """In whatever part of the step: those that lose it later wait for those that lose it early, and the other way."""
    pauses = {0: ("forward", 0.08), 1: ("backward", 0.08)}
    assert two_ranks.run(messages_of_a_run, pauses, 3 * EVERY_STEPS) == [[], []]
