"""The study behind the README's figures: does warm-up matter, where, and for how long. Hours on two cores; it goes on where it was left.

    python tests/bench/study/run.py [STAGE ...] [--output runs/study] [--seeds 5] [--concurrent 2] [--publish]

Packs the drawn square, pretrains a generator on it, runs the sweeps of the stages named (all by default) with equal compute per trial, and makes one
report of all sweeps there are. Compute is counted, not timed: seconds of a processor that does 20 GFLOP in each, about what a core here does. So
other work on the machine changes nothing, and stages may be run one by one. ``--publish`` joins raw results to those beside this file and
makes figures and tables of all of them again. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from torch.utils.flop_counter import FlopCounterMode

from cola_dist import storage
from cola_dist.evaluation.statistics import markdown_table
from cola_dist.methods import build_method, phases
from cola_dist.report.analysis import Analysis
from cola_dist.report.files import write_figures
from cola_dist.report.metrics import TABLE
from cola_dist.report.origin import origin
from cola_dist.report.page import build, sheets
from cola_dist.report.raw import write_raw
from cola_dist.report.study import read_study
from cola_dist.tracking import NullTracker
from cola_dist.train.job import write_config
from cola_dist.train.loop import Loop
from cola_dist.train.observer import to_clips
from cola_dist.train.sweep.folder import Sweep, new_sweep, open_sweep
from cola_dist.train.sweep.ledger import FAILED, read_ledger
from cola_dist.train.sweep.plan import Plan, Trial
from cola_dist.train.sweep.space import load_space
from cola_dist.train.worker import LocalWorker

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
FLOP_PER_SECOND = 20e9
PUBLISHED = ("curves", "response")
"""Figures of the report that are kept, by the beginning of their names."""

ABOUT = ("recipe", "space", "commit", "budget_seconds", "metric", "mode", "started")
"""What is published of a sweep: nothing of the machine that it ran on."""

SQUARE_MODEL = {"data.resolution": 24, "world.depth": 3}
"""Nine patches a frame and three blocks: a trial takes minutes, and the generator still beats a repeated frame by far."""
COMMON = {
    "train": {"workers": 1, "cpus_per_worker": 0.5, "checkpoint_every": 100_000},
    "optim.global_batch": 16,
    # The budget ends the joint phase; its steps only have to be more than that.
    "warmup.steps": 300,
    "joint.steps": 5_000,
    "diagnostics": {"every": 100, "clips": 128, "video_every": 100_000, "probe_clips": 1024, "alignment_clips": 64},
}
SQUARE = COMMON | {"lam.depth": 2, "conditioning.depth": 1}
EMBEDDED = {"embedded:robot": 0.5, "embedded:hand": 0.5}
MAIN = ["cola", "no-warmup", "two-stage", "stop-grad", "scratch"]
STAGES: dict[str, dict[str, Any]] = {
    "square-arms": {"arms": MAIN, "fixed": SQUARE, "budget": 60},
    "embedded-arms": {"arms": ["cola", "no-warmup"], "fixed": COMMON, "budget": 120},
    # Where warm-up matters: bottlenecks without remedies, with warm-up and without.
    "square-map": {"arms": ["vq"], "fields": {"warmup_length": [0, 300]}, "fixed": SQUARE, "budget": 60},
    # How long it should be; 0 and 300 are arms above.
    "square-lengths": {"arms": ["cola"], "fields": {"warmup_length": [100, "adaptive"]}, "fixed": SQUARE, "budget": 60},
    # Both teachers: the generator's gradient and the LAM's own forward model.
    "square-forward": {"arms": ["cola", "no-warmup"], "fields": {"objective.forward_weight": [1.0]}, "fixed": SQUARE, "budget": 60},
    "square-faithful": {"arms": ["vq-faithful"], "fields": {"warmup_length": [0, 300]}, "fixed": SQUARE, "budget": 60},
    "embedded-others": {"arms": ["two-stage", "stop-grad", "scratch"], "fixed": COMMON, "budget": 120},
}


def main() -> None:
    asked = _parse()
    output = Path(asked.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    sweeps: dict[str, str] = {}
    for stage in asked.stages or STAGES:
        domain = {"square": square(output)} if stage.startswith("square") else {"embedded": {"data.mixture": EMBEDDED}}
        sweeps[stage] = _sweep(stage, domain, output, asked)
    known = {stage: sweeps.get(stage) or newest_sweep(output / stage) for stage in STAGES}
    there = [sweep for sweep in known.values() if sweep]
    report = _job(
        "report.py", *there, "--output", str(output / "report.html"), "--figures", str(output / "figures"), "--data", str(output / "data")
    )
    if asked.publish:
        _publish(output, there)
    print(json.dumps({"sweeps": known, "report": report["output"], "trials": report["trials"], "winners": report["winners"]}))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", metavar="STAGE", help=", ".join(STAGES))
    parser.add_argument("--output", default="runs/study")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=2, help="trials at once")
    parser.add_argument("--publish", action="store_true")
    asked = parser.parse_args()
    for stage in asked.stages:
        if stage not in STAGES:
            parser.error(f"unknown stage {stage!r}; there are: {', '.join(STAGES)}")
    return asked


def square(output: Path) -> dict[str, Any]:
    """The drawn domain: shards and a generator, made once."""
    shards, generator = output / "shards" / "square", output / "square-generator.json"
    if not (shards / "index.parquet").exists():
        _job("pack.py", "simulate", "--domain", "square", "--episodes", "400", "--output", str(shards))
    if not generator.exists():
        options = ["--data.mixture", str(shards), "1", "--output", str(output / "pretrain"), "--joint.steps", "2000"]
        options += ["--optim.global-batch", "16", "--train.workers", "1", "--diagnostics.every", "500"]
        options += [word for name, value in SQUARE_MODEL.items() for word in (f"--{name}", str(value))]
        generator.write_text(json.dumps(_job("pretrain.py", "tiny-pretrain", *options)))
    pretrained = Path(json.loads(generator.read_text())["export"]) / "world"
    return SQUARE_MODEL | {"data.mixture": {str(shards): 1.0}, "world.pretrained": str(pretrained)}


def _sweep(stage: str, domains: dict[str, Any], output: Path, asked: argparse.Namespace) -> str:
    """The sweep of a stage, begun or gone on with. Returns its folder."""
    folder, described = output / stage, output / f"{stage}.yaml"
    if found := newest_sweep(folder):
        sweep = open_sweep(found, "")
    else:
        space = {key: value for key, value in STAGES[stage].items() if key != "budget"}
        described.write_text(yaml.safe_dump(space | {"seeds": asked.seeds, "domains": domains}, sort_keys=False))
        sweep = new_sweep(load_space(str(described)), ["--output", str(folder)], STAGES[stage]["budget"])
    with sweep.held():
        sweep.write()
        _run_trials(sweep, asked.concurrent)
    return sweep.uri


def _run_trials(sweep: Sweep, concurrent: int) -> None:
    """All trials that have not ended, each in a plain process that runs one after another.

    jobs/sweep.py would start a dozen processes of Ray for each: on two cores that takes longer than a trial of this size.
    """
    ledger = read_ledger(sweep.path("trials.json"))
    left = [trial for trial in sweep.plan.check() if trial.id not in ledger.entries or not ledger.entries[trial.id].ended]
    with ProcessPoolExecutor(concurrent, multiprocessing.get_context("spawn")) as pool, Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task(storage.name(sweep.uri), total=len(left))
        running = {}
        for trial in left:
            ledger.begin(trial, storage.join(sweep.plan.output, trial.id))
            running[pool.submit(_train, sweep.plan, trial)] = trial
        for done in as_completed(running):
            id, error = running[done].id, done.exception()
            outcome = {"status": FAILED, "why": repr(error)} if error else done.result()
            if not error:
                ledger.hear(id, outcome["steps"], outcome["spent_seconds"], outcome["value"])
            ledger.end(id, outcome["status"], outcome["why"])
            bar.advance(task)


@dataclass
class CountingWorker(LocalWorker):
    """The only worker, whose accelerator time is that of a nominal processor: the floating point operations of its steps, counted once per phase."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._cost: dict[str, float] = {}
        self._time, self._reads = 0.0, 0

    def count(self, loop: Loop) -> None:
        """Measure a step of each phase of the loop's course, forward and backward."""
        self._loop = loop
        clips = to_clips(loop.reader.read_many(range(loop.config.optim.global_batch)))
        for phase in phases(loop.config):
            method = build_method(loop.config, bf16=False)
            method.set_phase(phase)
            with FlopCounterMode(display=False) as counter:
                method(clips, 0).loss.backward()
            self._cost[phase.name] = counter.get_total_flops() / FLOP_PER_SECOND

    def clock(self) -> float:
        """Read right before and after a step: the second time a step of the present phase has passed."""
        self._reads += 1
        if self._reads % 2 == 0:
            span = self._loop.steering.due(self._loop.step)
            assert span is not None
            self._time += self._cost[span.phase.name]
        return self._time


def _train(plan: Plan, trial: Trial) -> dict[str, Any]:
    """Train a trial in this process; it goes on from its newest checkpoint."""
    config, run = plan.config(trial), storage.join(plan.output, trial.id)
    write_config(config, run)
    worker = CountingWorker(torch.device("cpu"))
    loop = Loop(config, run, worker, NullTracker(), "study")
    worker.count(loop)
    outcome = loop.run()
    result = {"run_id": trial.id, "status": outcome.status, "error": outcome.error, "steps": outcome.step, "record": outcome.record}
    storage.write_bytes(storage.join(run, "result.json"), json.dumps(result).encode())
    steering, last = outcome.record["steering"], list(outcome.record["evaluations"].values())[-1]
    why = outcome.error or steering["course"][-1]["why"]
    return {
        "status": outcome.status,
        "why": why,
        "steps": outcome.step,
        "spent_seconds": steering["spent_seconds"],
        "value": last["flow_loss"],
    }


def newest_sweep(folder: Path) -> str:
    """The newest sweep in a folder; empty where there is none."""
    return max((str(path.parent) for path in folder.glob("*/sweep.json")), default="")


def _job(script: str, *options: str) -> dict[str, Any]:
    """Run a job and return the JSON object that it prints last."""
    command = [sys.executable, str(ROOT / "jobs" / script), *options]
    print("+", " ".join(command[1:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{script} failed ({done.returncode}): {done.stdout[-500:]}")
    return dict(json.loads(done.stdout.strip().splitlines()[-1]))


def _publish(output: Path, sweeps: list[str]) -> None:
    """Raw results beside this file, joined with those of stages that were run elsewhere; figures and tables of all of them."""
    study = read_study([str(HERE), *sweeps])
    known = tuple(replace(sweep, about={name: sweep.about[name] for name in ABOUT if name in sweep.about}) for sweep in study.sweeps)
    write_raw(str(HERE), replace(study, superseded=(), sweeps=known))
    analysis = Analysis(study, "cola")
    for old in HERE.glob("*.png"):
        old.unlink()
    write_figures(str(HERE), [plate for plate in sheets(build(analysis, origin([]))) if plate.name.startswith(PUBLISHED)])
    parts = ["# The study's tables", "Made by `make study`; what they mean is in [RESULTS.md](../RESULTS.md)."]
    for domain in analysis.domains:
        for metric in TABLE:
            found = analysis.comparison(domain, metric)
            parts += [f"## {domain}: {metric.label}", markdown_table(found.table, metric.label) if found.table else f"{found.verdict}."]
    (HERE / "tables.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
