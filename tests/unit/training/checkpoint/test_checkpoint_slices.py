"""Slices of tensors: which rank writes which, and any box is read back from whatever files hold it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llmtrain.distributed.sharding import Part
from llmtrain.training.checkpoint.slices import (
    TensorSlice,
    first_held,
    owners_of,
    parts_to_write,
    save_parts,
    slices_in,
    slices_of,
    stored_tensors,
    why_incomplete,
)

FULL = torch.arange(40, dtype=torch.bfloat16).reshape(8, 5)


def part(tensor: Tensor, start: int, stop: int) -> Part:
    """Some rows of a tensor."""
    return Part(tensor[start:stop].clone(), (start, 0), tuple(tensor.shape))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Files of three ranks that hold 3, 0 and 5 rows; the first also holds a scalar and an empty tensor."""
    folder = tmp_path_factory.mktemp("optimizer")
    alone = {"count": Part(torch.tensor(7.0), (), ()), "nothing": Part(torch.zeros(0, 4), (0, 0), (0, 4))}
    for rank, (start, stop) in enumerate([(0, 3), (3, 3), (3, 8)]):
        parts = {"w": part(FULL, start, stop)} if start < stop else {}
        save_parts(folder / f"{rank}.safetensors", parts | (alone if rank == 0 else {}))
    return sorted(folder.iterdir())


@settings(max_examples=60, deadline=None)
@given(rows=st.tuples(st.integers(0, 8), st.integers(0, 8)), columns=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_any_box_is_read_from_the_files_that_hold_it(
    files: list[Path], rows: tuple[int, int], columns: tuple[int, int]
) -> None:
    index = (slice(min(rows), max(rows)), slice(min(columns), max(columns)))
    read = stored_tensors(files)["w"][index]
    assert read.dtype == FULL.dtype
    assert torch.equal(read, FULL[index])


def test_full_tensors_scalars_and_empty_tensors_are_read(files: list[Path]) -> None:
    stored = stored_tensors(files)
    assert {name: (tensor.ndim, tensor.shape) for name, tensor in stored.items()} == {
        "count": (0, ()),
        "nothing": (2, (0, 4)),
        "w": (2, (8, 5)),
    }
    assert stored["count"][()] == 7.0
    assert stored["nothing"].full().shape == (0, 4)
    assert torch.equal(stored["w"].full(), FULL)


def test_a_file_says_of_which_tensors_it_holds_slices(files: list[Path]) -> None:
    found = slices_in(files[2])
    assert found == {"w": TensorSlice("BF16", (5, 5), (3, 0), (8, 5))}
    assert found["w"].as_record() == {"dtype": "BF16", "shape": [5, 5], "of": [8, 5], "offset": [3, 0]}
    assert TensorSlice.from_record(found["w"].as_record()) == found["w"]
    assert slices_in(files[0])["count"].as_record() == {"dtype": "F32", "shape": []}


@pytest.mark.parametrize(
    ("rows", "fault"),
    [
        ([(0, 3), (3, 8)], None),
        ([(3, 8), (0, 3)], None),
        ([(0, 3)], "the slices of w do not make up the tensor: 15 elements of 40"),
        ([(0, 3), (4, 8)], "the slices of w do not make up the tensor: 35 elements of 40"),
        ([(0, 4), (3, 8)], "the slices of w do not make up the tensor: 45 elements of 40"),
        ([(0, 3), (0, 3)], "the slices of w do not make up the tensor: 30 elements of 40"),
    ],
)
def test_gaps_and_overlaps_are_named(rows: list[tuple[int, int]], fault: str | None) -> None:
    assert why_incomplete({"w": [TensorSlice.of(part(FULL, start, stop)) for start, stop in rows]}) == fault


def test_slices_of_different_tensors_are_named() -> None:
    other = TensorSlice.of(part(FULL.float(), 3, 8))
    assert (
        why_incomplete({"w": [TensorSlice.of(part(FULL, 0, 3)), other]}) == "the slices of w are of different tensors"
    )


def test_a_grid_of_rows_and_columns_is_complete() -> None:
    boxes = [TensorSlice("F32", (2, 3), (row, column), (4, 6)) for row in (0, 2) for column in (0, 3)]
    assert why_incomplete({"w": boxes}) is None
    assert why_incomplete({"w": boxes[:3]}) is not None


def test_the_first_of_the_ranks_that_hold_a_slice_writes_it_and_nobody_an_empty_one() -> None:
    same = Part(torch.ones(2), (0,), (2,))
    ranks = [
        {"w": part(FULL, 0, 3), "norm": same, "late": part(FULL, 0, 0)},
        {"w": part(FULL, 3, 8), "norm": same, "late": part(FULL, 0, 8)},
    ]
    slices = [slices_of(parts) for parts in ranks]
    assert [sorted(parts_to_write(parts, slices, rank=rank)) for rank, parts in enumerate(ranks)] == [
        ["norm", "w"],
        ["late", "w"],
    ]
    assert sorted(parts_to_write(ranks[0], slices[:1], rank=0)) == ["late", "norm", "w"]


def test_a_rank_sends_only_slices_that_no_rank_before_it_holds() -> None:
    shards = {"w": part(FULL, 0, 3)}, {"w": part(FULL, 3, 8)}
    replicas = [slices_of(shards[rank % 2]) for rank in range(4)]
    assert first_held(replicas) == [{"w"}, {"w"}, set(), set()]


def test_units_stay_together_and_ranks_get_about_as_many_bytes() -> None:
    parts = {
        f"{block}.{name}": Part(torch.ones(size), (0,), (size,))
        for block in "abc"
        for name, size in [("x", 6), ("y", 2)]
    }
    parts["head"] = Part(torch.ones(9), (0,), (9,))
    owners = owners_of(parts, unit_of=lambda name: name.partition(".")[0], num_ranks=2)
    assert owners == {"head": 0, "a.x": 1, "a.y": 1, "b.x": 1, "b.y": 1, "c.x": 0, "c.y": 0}
