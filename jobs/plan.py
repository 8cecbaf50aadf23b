"""Judge world models by what plans made with them achieve, beside plans made with the simulator itself and beside random actions.

    python jobs/plan.py --domain square [--task reach] [--models URI ...] [--planner mppi] [--episodes N] [--seeds S ...]
    python jobs/plan.py --domain robodesk --task push_red --models RUN_A RUN_B --simulator-samples 50

Each URI is a model adapted to the domain's actions; all get the same starts and goals. --output gets results.json, episodes.parquet and films of each
model's best and worst episode (on the right: the goal), as does each model's run in MLflow. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro
from rich.console import Console
from rich.progress import Progress

from cola_dist.command import run_command
from cola_dist.planning.planner import PlannerName


@dataclass(frozen=True)
class Tracking:
    uri: str = ""
    """MLflow's tracking URI; empty = each model's own."""


@dataclass(frozen=True)
class Plan:
    domain: str = "square"
    task: str = ""
    """Empty = the domain's first."""
    models: tuple[str, ...] = ()
    """Adapted models: a path or s3:// URI each."""
    planner: PlannerName = "mppi"
    episodes: int = 10
    """For each seed."""
    seeds: tuple[int, ...] = (0,)
    horizon: int = 10
    """Actions that a plan looks ahead."""
    samples: int = 0
    """Action sequences per plan; 0 = as VP2 has it for the task."""
    simulator_samples: int = 0
    """The same for plans made with the simulator itself, which may be slow; 0 = as many."""
    sampler_steps: int = 0
    """Sampler steps of learned models; 0 = as trained for."""
    at_once: int = 200
    """Sequences that a learned model imagines together; fewer take less memory."""
    classifier: bool = False
    """Train a success classifier on labelled frames of the domain and add it to the objective, as VP2 does."""
    output: str = "runs/plan"
    parallel: int = 0
    """Environments at once; 0 = one per CPU."""
    gpus: float = 0.0
    """GPUs of each environment; a half lets two share one."""
    tracking: Tracking = field(default_factory=Tracking)
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    began, job = time.monotonic(), tyro.cli(Plan, args=argv, description=__doc__)

    from cola_dist import runtime
    from cola_dist.planning.results import artifacts, flat, result_table, summary, write_results
    from cola_dist.planning.study import Request, prepare, run_on_ray

    asked = (job.domain, job.task, job.models, job.planner, job.episodes, job.seeds, job.horizon)
    request = Request(*asked, job.samples, job.simulator_samples, job.sampler_steps, job.at_once)
    setup = prepare(request, job.classifier)
    runtime.connect(max(1, job.parallel), job.debug)
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("episodes", total=len(setup.models) * len(job.seeds) * job.episodes)
        episodes = run_on_ray(setup, job.parallel, job.gpus, lambda _: progress.advance(bar))
    found = summary(episodes, setup)
    files = list(write_results(job.output, found, episodes).values())
    Console(width=150).print(result_table(found))
    line = {"status": "done", "output": job.output, **found, "files": files}
    kept = artifacts(job.output, found) if setup.uris else {}
    tracked = [name for name, uri in setup.uris.items() if _track(job, uri, kept, flat(name, found))]
    return line | {"tracked": tracked, "seconds": time.monotonic() - began}


def _track(job: Plan, uri: str, files: Mapping[str, bytes], metrics: Mapping[str, float]) -> bool:
    """Add results to a learned model's run in MLflow."""
    from cola_dist.evaluation.exported import read_run_config
    from cola_dist.train.session import add_results

    return add_results(uri, read_run_config(uri), job.tracking.uri, files, metrics)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
