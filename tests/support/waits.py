"""Counts what makes a host wait for its GPU, where there is none: operators whose result the host has to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAITING = {"_local_scalar_dense", "equal", "masked_select", "nonzero", "repeat_interleave", "_unique2"}


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context manager: counts, by operator, the values that the host reads in the block, in backward passes too.

    `nonzero` counts indexing with a mask too, of which it is the first half. `copies` counts tensors of the host that
    are copied to a GPU. A number that `tolist` reads on a CPU is no operator, and is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values: Counter[str] = Counter()
        self.copies = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func.overloadpacket.__name__, func(*args, **(kwargs or {}))
        if name in _WAITING:
            self.values[name] += 1
        elif name in ("index", "index_put", "index_put_") and any(_is_mask(index) for index in args[1]):
            self.values["nonzero"] += 1
        elif name in ("_to_copy", "copy_") and isinstance(result, Tensor):
            self.copies += (_source(name, args).device.type, result.device.type) == ("cpu", "cuda")
        return result


def _is_mask(index: Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _source(name: str, args: Sequence[Tensor]) -> Tensor:
    return args[1] if name == "copy_" else args[0]
