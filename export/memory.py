"""Gives memory back to the system while a model is taken apart, so that the exporter's peak is one copy and a little.

Weights of a Hugging Face folder are pages of its files, mapped as a whole: dropping one tensor frees nothing until all are gone.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

MADV_DONTNEED = 4
"""Linux: drop these pages. Those of a file come back from it when read again, others as zeros."""


def give_back_pages(consumed: Tensor) -> None:
    """Lets the pages of a tensor go that nobody will read again. Only whole pages inside it; does nothing but on Linux."""
    if not sys.platform.startswith("linux"):
        return
    start = consumed.data_ptr()
    stop = start + consumed.numel() * consumed.element_size()
    first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
    if consumed.is_contiguous() and last > first:
        ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), MADV_DONTNEED)
