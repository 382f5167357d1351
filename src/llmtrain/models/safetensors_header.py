"""Reads the header of a safetensors file: types of its tensors, and metadata. No tensor is read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open


@dataclass(frozen=True)
class StoredType:
    """Type of a tensor in a file."""

    dtype: str
    """Name of the dtype in safetensors: F32, BF16 …"""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class SafetensorsHeader:
    """Header of a safetensors file."""

    tensors: dict[str, StoredType]
    """Stored tensors in the order of the file."""
    metadata: dict[str, str]


def read_header(path: Path) -> SafetensorsHeader:
    """Read a file's header. Raises SafetensorError or OSError if it cannot be read."""
    with safe_open(path, framework="pt") as file:
        stored = {name: file.get_slice(name) for name in file.offset_keys()}
        tensors = {name: StoredType(tensor.get_dtype(), tuple(tensor.get_shape())) for name, tensor in stored.items()}
        return SafetensorsHeader(tensors, file.metadata() or {})
