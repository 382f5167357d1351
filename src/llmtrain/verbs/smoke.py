"""`smoke`: train a small classifier on generated data in every process, and check that they work together.

all_reduce   every rank adds up the numbers of all ranks
device       no two ranks of a machine share a GPU
gradients    after the backward pass every rank holds the same gradient, bit for bit
loss         the loss falls
"""

from __future__ import annotations

import hashlib
import math
import socket
import time
from typing import Any

import torch
from torch import Tensor, nn

from llmtrain.config.sections.running import RunConfig
from llmtrain.config.sections.training import DistributedConfig, TrainerConfig
from llmtrain.distributed.engine import Engine
from llmtrain.distributed.resolve import resolve
from llmtrain.errors import ConfigError
from llmtrain.faults import reach


def smoke(
    *,
    epochs: int = 2,
    batch_size: int = 256,
    samples: int = 4096,
    features: int = 128,
    classes: int = 4,
    lr: float = 3e-3,
    seed: int = 42,
    device: str = "auto",
) -> dict[str, Any]:
    """Train and check; return `ok`, and the findings of every rank. `batch_size` is that of each process.

    Raises ConfigError for settings that leave nothing to train on, or a device that is not there.
    """
    distributed, trainer = DistributedConfig(), TrainerConfig(precision="32", compile=False)
    engine = Engine(resolve(RunConfig(device=device), trainer, distributed), distributed=distributed)
    try:
        if samples < batch_size * engine.world_size:
            raise ConfigError(
                f"{samples} samples are fewer than one batch of {batch_size} on each of {engine.world_size} ranks: "
                "raise --samples or lower --batch-size"
            )
        began = time.perf_counter()
        losses, digests = _train(
            engine,
            epochs=epochs,
            batch_size=batch_size,
            data=_separable_points(samples, features=features, classes=classes, seed=seed),
            lr=lr,
            seed=seed,
        )
        mine = {
            "rank": engine.rank,
            "host": socket.gethostname(),
            "device": str(engine.device),
            "sum_of_ranks": engine.sum(engine.rank + 1)[0],
            "gradient_digests": digests,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "seconds": time.perf_counter() - began,
        }
        return judge(engine.gather(mine))
    finally:
        engine.close()


def _separable_points(samples: int, *, features: int, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return points [samples, features] and their classes, which are linear in them; the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(samples, features, generator=generator)
    return points, (points @ torch.randn(features, classes, generator=generator)).argmax(dim=1)


def _train(
    engine: Engine, *, epochs: int, batch_size: int, data: tuple[Tensor, Tensor], lr: float, seed: int
) -> tuple[list[float], list[str]]:
    """Return the mean loss of every epoch, and a digest of this rank's gradients at the end of every epoch."""
    points, targets = data
    torch.manual_seed(seed)
    classes = int(targets.max()) + 1
    model = engine.setup(nn.Sequential(nn.Linear(points.shape[1], 64), nn.ReLU(), nn.Linear(64, classes)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    losses, digests = [], []
    step_size = batch_size * engine.world_size
    for epoch in range(epochs):
        order = torch.randperm(len(points), generator=torch.Generator().manual_seed(seed + epoch))
        total, steps = 0.0, 0
        for start in range(0, len(points) - step_size + 1, step_size):
            rows = order[start + engine.rank * batch_size :][:batch_size]
            logits = model(points[rows].to(engine.device))
            loss = nn.functional.cross_entropy(logits, targets[rows].to(engine.device))
            optimizer.zero_grad()
            engine.backward(loss)
            reach("smoke-gradients", rank=engine.rank)
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        losses.append(engine.sum_floats([total / steps])[0] / engine.world_size)
        digests.append(_digest(model))
    return losses, digests


def _digest(model: nn.Module) -> str:
    """Return a hash of all gradients' bits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        assert parameter.grad is not None
        digest.update(parameter.grad.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def judge(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare the findings of all ranks, and return them with the result of each rank's checks."""
    places = [(rank["host"], rank["device"]) for rank in ranks if rank["device"].startswith("cuda")]
    for rank in ranks:
        shared = places.count((rank["host"], rank["device"])) > 1
        rank["checks"] = {
            "all_reduce": rank["sum_of_ranks"] == len(ranks) * (len(ranks) + 1) // 2,
            "device": not shared,
            "gradients": rank["gradient_digests"] == ranks[0]["gradient_digests"],
            "loss": math.isfinite(rank["last_loss"]) and rank["last_loss"] < 0.99 * rank["first_loss"],
        }
    return {"ok": all(all(rank["checks"].values()) for rank in ranks), "world_size": len(ranks), "ranks": ranks}
