"""Judge a finished run by all there is, in one go: held-out clips, probe, atlas, real actions by share of episodes, plans; and make a page of it.

    python jobs/judge.py RUN [--beside RUN ...] [--output DIR] [--robot FOLDER] [--shares S S ...] [--episodes N]

RUN is the folder of a finished run of jobs/cotrain.py, a path or s3:// URI. It calls other jobs as a user would, and says how. Stopped, the same
command goes on with the step it stood at. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from cola_dist import storage
from cola_dist.chain import Chain
from cola_dist.command import run_command
from cola_dist.evaluation.exported import read_run_config
from cola_dist.train.session import add_results, tracking_uri


@dataclass(frozen=True)
class Judge:
    run: tyro.conf.Positional[str]
    output: str = ""
    """Folder for all that is made; empty = RUN/judged."""
    beside: tuple[str, ...] = ()
    """Other finished runs, such as a two-stage one, that are adapted to the square and plan there like RUN."""
    robot: str = "embedded:robot"
    """Shards with real actions, for the curve over shares of episodes."""
    recipe: str = "tiny-adapt"
    """Of the adaptations."""
    shares: tuple[float, ...] = (0.05, 0.2, 1.0)
    clips: int = 32
    """Held-out clips for video metrics."""
    square_steps: int = 600
    """Steps of the adaptation to the drawn square, in which plans are made."""
    episodes: int = 10
    """Episodes that each model plans, for each of two seeds."""
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    job = tyro.cli(Judge, args=argv, description=__doc__)
    output = storage.absolute(job.output or storage.join(job.run, "judged"))
    square, runs, plans, page = (storage.join(output, name) for name in ("square", "runs", "plans", "report.html"))
    config, *_ = [read_run_config(run) for run in (job.run, *job.beside)]
    # Adaptations are tracked where the run was.
    tracking = ("--tracking.uri", tracking_uri(config))
    clips = ("--clips", str(job.clips), "--probe-clips", "256", "--output", storage.join(output, "evaluation"), "--workers", "2")
    chain = Chain(output, Path(__file__).parent)
    told = {"evaluate": chain.step("evaluate", job.run, *clips)}
    shares = ("--shares", *map(str, job.shares), "--data.mixture", job.robot, "1")
    told["shares"] = chain.step("shares", job.run, job.recipe, *shares, "--output", runs, *tracking, of="adapt")
    told["square"] = chain.step("square", "simulate", "--domain", "square", "--episodes", "400", "--output", square, of="pack")
    # RUN has not seen the square: its codes say nothing there, and the generator has all of it to learn.
    new = ["--adapt.match-weight", "0", "--adapt.lr-world", "1e-3", "--adapt.lr-conditioning", "2e-3", "--adapt.steps"]
    adapted = []
    for number, run in enumerate((job.run, *job.beside)):
        options = (job.recipe, "--data.mixture", square, "1", *new, str(job.square_steps), "--output", runs, *tracking)
        done = chain.step(f"adapt-{number}", run, *options, of="adapt")
        adapted.append(storage.join(runs, done["run_id"]))
    size = ["--seeds", "0", "1", "--samples", "50", "--horizon", "6", "--sampler-steps", "2", "--episodes", str(job.episodes)]
    told["plan"] = chain.step("plan", "--models", *adapted, *size, "--output", plans)
    folders = (told["evaluate"]["output"], told["shares"]["series"], plans)
    told["report"] = chain.step("report", *folders, "--output", page)
    line = {"run": job.run, "output": output, "report": page} | {name: told["evaluate"][name] for name in ("figures", "probe")}
    line |= {"shares": told["shares"]["points"], "plans": told["plan"]["models"], "plan_pairs": told["plan"]["pairs"]}
    line["tracked"] = add_results(job.run, config, "", {"report/report.html": storage.read_bytes(page)}, {})
    return line | {"seconds_by_step": chain.seconds, "wall_seconds": round(time.monotonic() - began, 1)}


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
