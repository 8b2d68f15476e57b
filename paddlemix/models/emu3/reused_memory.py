# Licensed under the Apache License, Version 2.0; see LICENSE.
"""Arrays in memory that arrays before them had: where each is made once and soon forgotten, as the features of a
picture are, most of their time would go into fresh pages, which the system clears."""

import contextlib
import math
import sys
import threading

import numpy as np

ALIGNMENT = 16  # numbers: a line of the cache

_of_thread = threading.local()


@contextlib.contextmanager
def reused_memory():
    """Inside it, in this thread, `empty` uses memory again; at its end all is given back."""
    _of_thread.blocks = []
    try:
        yield
    finally:
        del _of_thread.blocks


def empty(shape):
    """A float32 array, not initialised, in the smallest block of memory that is large enough and that no array uses."""
    blocks, size = getattr(_of_thread, "blocks", []), math.prod(shape) + ALIGNMENT
    unused = [block for block in blocks if sys.getrefcount(block) == 3]  # `blocks`, `block` and the argument
    block = min((block for block in unused if block.size >= size), key=len, default=None)
    if block is None:
        blocks[:] = [block for block in blocks if not any(block is other for other in unused)]  # too small, all of them
        block = np.empty(size, np.float32)
        blocks.append(block)
    start = -block.ctypes.data // 4 % ALIGNMENT
    return block[start : start + math.prod(shape)].reshape(shape)
