"""Headers of safetensors files: types and metadata, in the order of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmtrain.models.safetensors_header import StoredType, read_header

TENSORS = {
    "b": torch.zeros(2, 3),
    "a": torch.zeros(5, dtype=torch.bfloat16),
    "empty": torch.zeros(0, 4),
    "z": torch.tensor(7, dtype=torch.int64),
    "c": torch.zeros(2, dtype=torch.bool),
}


def test_the_header_gives_types_and_metadata_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "some.safetensors"
    save_file(TENSORS, file, metadata={"format": "pt"})
    header = read_header(file)
    assert header.metadata == {"format": "pt"}
    assert header.tensors == {
        "a": StoredType("BF16", (5,)),
        "b": StoredType("F32", (2, 3)),
        "c": StoredType("BOOL", (2,)),
        "empty": StoredType("F32", (0, 4)),
        "z": StoredType("I64", ()),
    }
    content = file.read_bytes()
    stored = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    del stored["__metadata__"]
    assert list(header.tensors) == list(stored)


def test_a_file_without_metadata_has_an_empty_one(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "some.safetensors")
    assert read_header(tmp_path / "some.safetensors").metadata == {}


@pytest.mark.parametrize("content", [b"", b"\x02\0\0\0\0\0\0\0{}more", b"\xff" * 20])
def test_a_damaged_header_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises((SafetensorError, OSError)):
        read_header(tmp_path / "bad.safetensors")
