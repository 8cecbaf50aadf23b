"""Memory for batches that is used again.

The first touch of fresh memory costs several times what copying into it does, the more so the larger the array: the system has to find and clear each
page (tests/bench/bench_memory.py).
"""

from __future__ import annotations

import sys

import numpy as np
from numpy.typing import NDArray

_KEPT = 2
"""Arrays kept: one that Ray Data may still hold, and the next."""
_UNUSED = 2
"""References to an array that nobody else holds, as ``sys.getrefcount`` counts: the list's and that of the call itself. Each view of an array and
each Arrow buffer over it holds one more."""


class Recycler:
    """Hands out uint8 arrays, again once nobody holds them or any part of them any more."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An array of that shape, its contents arbitrary."""
        for index in range(len(self._arrays)):
            if self._arrays[index].shape == shape and sys.getrefcount(self._arrays[index]) == _UNUSED:
                return self._arrays[index]
        array = np.empty(shape, np.uint8)
        self._arrays = [array, *self._arrays[: _KEPT - 1]]
        return array
