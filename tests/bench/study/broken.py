"""Does the verdict see what is broken, and only that? Deliberately broken runs up to the first evaluation after their grace, beside the study's own
healthy ones.

    python tests/bench/study/broken.py [--output runs/study] [--seeds 5] [--concurrent 2]

Needs what `run.py` has packed and pretrained. Broken in two ways: a codebook that stays as it was drawn, with the paper's commitment, so that no code
can come to mean anything; and actions that reach the generator from another clip whenever it trains. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
from run import COMMON, SQUARE, STAGES, newest_sweep, square  # beside this file

from cola_dist.config import RunConfig
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.report.study import read_study
from cola_dist.settings import apply_overrides, as_options, base_of
from cola_dist.tracking import NullTracker
from cola_dist.train.loop import Loop
from cola_dist.train.sweep.drive import read_looks
from cola_dist.train.worker import LocalWorker

EVERY = COMMON["diagnostics"]["every"]
FROZEN_CODES = ["--lam.bottleneck.init", "normal", "--lam.bottleneck.codebook-weight", "0", "--lam.bottleneck.commitment-weight", "0.25"]
FROZEN_CODES += ["--lam.bottleneck.reset-every", "0"]


def config_of(output: Path, seed: int, options: list[str]) -> RunConfig:
    """The study's `cola` on the square, in warm-up until its grace is over."""
    config = apply_overrides(base_of("tiny"), [*as_options(SQUARE, "fixed"), *as_options(square(output), "square"), *options])
    warmup = replace(config.warmup, steps=-(-config.diagnostics.grace_steps // EVERY) * EVERY)
    return replace(config, warmup=warmup, joint=replace(config.joint, steps=0), train=replace(config.train, seed=seed))


@contextmanager
def shuffled_actions() -> Iterator[None]:
    """While a method trains, each clip gets the actions of the one before it in the batch."""
    whole = ActionConditioning.forward

    def of_another(self: ActionConditioning, actions: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
        return whole(self, actions.roll(1, 0) if self.training else actions, dropped)

    with patch.object(ActionConditioning, "forward", of_another):
        yield


BROKEN = {"codebook frozen at random": (FROZEN_CODES, nullcontext), "actions shuffled in training": ([], shuffled_actions)}


def last_look(name: str, output: Path, seed: int) -> dict[str, Any]:
    """What the first evaluation after the grace says of a run that is broken in the way of that name."""
    options, breaking = BROKEN[name]
    with tempfile.TemporaryDirectory() as run, breaking():
        Loop(config_of(output, seed, options), run, LocalWorker(torch.device("cpu")), NullTracker(), "broken").run()
        look = list(read_looks(run, set()))[-1]
    kept = ("perplexity", "sensitivity_gap", "flow_loss", "effective_rank")
    return {"seed": seed, "step": look["step"], "verdict": look["verdict"]} | {key: round(look["indicators"][key], 5) for key in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="runs/study")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=2)
    asked = parser.parse_args()
    output = Path(asked.output).resolve()
    found: dict[str, Any] = {}
    with ProcessPoolExecutor(asked.concurrent, multiprocessing.get_context("spawn")) as pool:
        coming = {name: [pool.submit(last_look, name, output, seed) for seed in range(asked.seeds)] for name in BROKEN}
        for name, futures in coming.items():
            looks = [future.result() for future in futures]
            print(f"{name}: {looks}", file=sys.stderr, flush=True)
            found[name] = {"runs": len(looks), "collapsed": sum(look["verdict"] == "collapsed" for look in looks), "looks": looks}
    grace = base_of("tiny").diagnostics.grace_steps
    for stage in STAGES:
        healthy = (
            [trial for trial in read_study([sweep]).finished if trial.arm == "cola"] if (sweep := newest_sweep(output / stage)) else []
        )
        if healthy:
            late = [[look.verdict for look in trial.looks if look.step >= grace] for trial in healthy]
            ever = sum("collapsed" in one for one in late)
            found[f"healthy: cola in {stage}"] = {"runs": len(healthy), "ever_collapsed": ever, "looks": Counter(chain.from_iterable(late))}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
