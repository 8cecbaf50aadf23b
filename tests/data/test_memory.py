from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pytest
from ray.data.block import BlockAccessor

from cola_dist.data.memory import Recycler


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_memory_that_nobody_holds_is_used_again() -> None:
    recycler = Recycler()
    first = address(recycler.take((2, 3)))
    assert address(recycler.take((2, 3))) == first
    assert recycler.take((3, 3)).shape == (3, 3)


@pytest.mark.parametrize(
    "hold",
    [
        lambda array: array,
        lambda array: array[1:],
        lambda array: array.reshape(-1),
        lambda array: memoryview(array),
        lambda array: pa.py_buffer(array),
        lambda array: BlockAccessor.batch_to_block({"video": array}),
    ],
    ids=["array", "part", "view", "memoryview", "arrow buffer", "block"],
)
def test_memory_of_which_a_part_is_held_is_not(hold: Callable[[np.ndarray], object]) -> None:
    recycler = Recycler()
    first = recycler.take((4, 3, 2))
    kept, held = address(first), hold(first)
    del first
    taken = recycler.take((4, 3, 2))
    taken[:] = 1
    other = recycler.take((4, 3, 2))
    other[:] = 2
    assert (taken == 1).all()
    assert len({kept, address(taken), address(other)}) == 3
    del held


def test_a_block_is_made_without_a_copy() -> None:
    # What the reader saves would be spent here: Arrow's memory would be the fresh one.
    video = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    block = BlockAccessor.batch_to_block({"video": video})
    buffers = [buffer for chunk in block["video"].chunks for buffer in chunk.storage.buffers() if buffer is not None]
    assert address(video) in {buffer.address for buffer in buffers}
