"""What a reader saves by filling memory that was used before instead of a new array. Prints one JSON line last.

    python tests/bench/bench_memory.py [--rounds 7]

For reads of the sizes that the stream makes (256 clips of 9 frames of 64 pixels, and of 17 frames of 128), processor time per MB of filling the batch
clip by clip, in a new array each time and in the recycled one, in alternation; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from cola_dist.data.memory import Recycler

SHAPES = {"9 frames, 64 px": (256, 9, 3, 64, 64), "17 frames, 128 px": (256, 17, 3, 128, 128)}


def fill(take: Callable[[tuple[int, ...]], np.ndarray], shape: tuple[int, ...], clip: np.ndarray) -> float:
    """Milliseconds of processor time per MB."""
    began = time.process_time()
    for place in take(shape):
        place[:] = clip
    return 1e3 * (time.process_time() - began) / (np.prod(shape) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    line: dict[str, object] = {"bench": "memory"}
    for name, shape in SHAPES.items():
        clip, recycler = np.ones(shape[1:], np.uint8), Recycler()
        fill(recycler.take, shape, clip)
        pairs = [(fill(lambda size: np.empty(size, np.uint8), shape, clip), fill(recycler.take, shape, clip)) for _ in range(rounds)]
        new, again = (statistics.median(values) for values in zip(*pairs, strict=True))
        line |= {f"{name}: new, ms/MB": round(new, 3), f"{name}: again, ms/MB": round(again, 3)}
        line[f"{name}: new over again"] = round(statistics.median(a / b for a, b in pairs), 2)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
