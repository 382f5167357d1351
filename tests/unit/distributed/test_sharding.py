"""Sharding puts everything that a model computes with on the mesh's device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from llmtrain.distributed.sharding import shard
from llmtrain.models.decoder.decoder import Decoder
from tests.support.tiny import TINY_VOCAB_SIZE, tiny_config


@contextmanager
def ranks(data_parallel: int, tensor_parallel: int = 1, *, rank: int = 0) -> Iterator[DeviceMesh]:
    """Ranks of which only this one exists."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=data_parallel * tensor_parallel)
    names = ("data_parallel", "tensor_parallel")
    try:
        yield init_device_mesh("cpu", (data_parallel, tensor_parallel), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Two data-parallel ranks."""
    with ranks(2) as mesh:
        yield mesh


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


@pytest.mark.parametrize("rank", range(4))
def test_replicas_share_shards_among_neighbours_and_hold_the_same_as_each_other(rank: int) -> None:
    with ranks(4, rank=rank) as mesh:
        decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE)
        full = {name: parameter.detach().clone() for name, parameter in decoder.named_parameters()}
        shard(decoder, mesh, precision="32", replicate=2)
        for name, parameter in decoder.named_parameters():
            assert isinstance(parameter, DTensor)
            assert parameter.placements == (Replicate(), Shard(0))
            assert parameter.device_mesh.mesh.tolist() == [[0, 1], [2, 3]]  # replicas of two ranks each
            assert torch.equal(parameter.to_local(), full[name].chunk(2)[rank % 2])


def test_replicas_of_split_matrices_have_the_three_placements() -> None:
    with ranks(4, 2) as mesh:
        decoder = Decoder(tiny_config(), TINY_VOCAB_SIZE)
        shard(decoder, mesh, precision="32", replicate=2)
        weight = decoder.blocks[0].get_parameter("attention.o_proj.weight")
        assert isinstance(weight, DTensor)
        assert weight.device_mesh.mesh_dim_names == ("replicate", "shard", "tensor_parallel")
        assert weight.placements[0] == Replicate()
        assert weight.to_local().numel() * 4 == weight.numel()
