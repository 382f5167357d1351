"""Makes importing torch, and modules that import it, faster."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Turn off garbage collection within the block; later collections skip the imported objects.

    Importing torch makes a million objects that stay. The collector would visit them again and again, which takes a
    sixth of the time of the imports. If torch is already imported, nothing changes.
    """
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
