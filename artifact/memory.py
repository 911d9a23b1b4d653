"""What a process asks of its allocator."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Has glibc return freed blocks to the system; does nothing elsewhere."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
