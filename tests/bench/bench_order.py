"""What it costs to ask which clip stands at a position. Prints one JSON line.

    python tests/bench/bench_order.py [--positions 20000] [--rounds 5]

Two sources of 10,000 and 5,000 episodes, with and without a stage, clips of 17 frames. ``list`` is the alternative: the same clips written down
once and looked up, which costs memory for every position and has to be made again for every seed and mixture. One thread; medians over rounds.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cola_dist.data.order import ClipRef, EpisodeSpan, Order, Source


def microseconds(look_up: Callable[[int], ClipRef], positions: Sequence[int]) -> float:
    """Processor time per position."""
    began = time.process_time()
    for position in positions:
        look_up(position)
    return (time.process_time() - began) / len(positions) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    sources = [Source("a", 0.7, (EpisodeSpan(60, 1),) * 10_000, "a"), Source("b", 0.3, (EpisodeSpan(90, 2),) * 5_000, "b")]
    order = Order(sources, 17, 64, 0)
    staged = Order(sources, 17, 64, 0, {1000: {"a": 0.5, "b": 0.5}, 100_000: {"b": 1.0}})
    tracemalloc.start()
    written = [order.clip(position) for position in range(args.positions)]
    list_bytes = tracemalloc.get_traced_memory()[0] / args.positions
    tracemalloc.stop()
    draw = random.Random(0)
    anywhere = [draw.randrange(10**9) for _ in range(args.positions // 4)]
    inside = [draw.randrange(args.positions) for _ in range(args.positions)]
    cases: dict[str, tuple[Callable[[int], ClipRef], Sequence[int]]] = {
        "sequential_us": (order.clip, range(args.positions)),
        "sequential_at_1e9_us": (order.clip, range(10**9, 10**9 + args.positions)),
        "sequential_at_1e12_us": (order.clip, range(10**12, 10**12 + args.positions)),
        "sequential_with_stages_at_1e9_us": (staged.clip, range(10**9, 10**9 + args.positions)),
        "random_below_1e9_us": (order.clip, anywhere),
        "list_sequential_us": (written.__getitem__, range(args.positions)),
        "list_random_us": (written.__getitem__, inside),
    }
    rounds = [{name: microseconds(*case) for name, case in cases.items()} for _ in range(args.rounds)]
    line: dict[str, object] = {"bench": "order", "positions": args.positions, "rounds": args.rounds}
    medians = {name: statistics.median(figures[name] for figures in rounds) for name in cases}
    line |= {name: round(value, 3) for name, value in medians.items()}
    line |= {"list_bytes_per_position": round(list_bytes)}
    line |= {"sequential_over_list": round(medians["sequential_us"] / medians["list_sequential_us"], 1)}
    print(json.dumps(line))


if __name__ == "__main__":
    main()
