"""Imports torch, and the modules that build on it, in less time."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def large_imports() -> Iterator[None]:
    """Import in this block without garbage collection; later collections skip the imported objects.

    Importing torch makes a million lasting objects. The collector would visit them again and again, which takes a
    sixth of the time of the imports. Where torch is already imported, nothing changes.
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
