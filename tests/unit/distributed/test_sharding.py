"""Sharding puts everything that a model computes with on the mesh's device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmtrain.distributed.sharding import shard
from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two data-parallel ranks, of which the other one does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    dist.destroy_process_group()


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters, buffers and tables that are neither."""
    tables = [value for part in module.modules() for value in vars(part).values() if isinstance(value, Tensor)]
    return [*module.parameters(), *module.buffers(), *tables]


@pytest.mark.parametrize("encoding", ["rope", "sinusoidal", "learned", "alibi"])
def test_tables_of_positions_move_with_the_parameters(encoding: str, mesh: DeviceMesh) -> None:
    decoder = Decoder(tiny_config(positional={"encoding": encoding}), TINY_VOCAB_SIZE)
    tables = decoder.rotary or decoder.sinusoidal
    if tables is not None:
        tables.to("meta")  # any device but the mesh's, as the CPU is where the mesh is one of GPUs
    shard(decoder, mesh, precision="32")
    assert {tensor.device for tensor in tensors_of(decoder)} == {torch.device("cpu")}
