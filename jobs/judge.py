"""Judge a finished run by all there is, in one go: held-out clips, probe, atlas, real actions by share of episodes, plans; and make a page of it.

    python jobs/judge.py RUN [--output DIR] [--robot FOLDER] [--shares S S ...] [--episodes N]

RUN is the folder of a finished run of jobs/cotrain.py, a path or s3:// URI. It calls other jobs as a user would, and says how. Stopped, the same
command goes on with the step it stood at. The last line on stdout is a JSON object.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tyro

from cola_dist import storage
from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.evaluation.exported import read_run_config
from cola_dist.redact import redact
from cola_dist.train.session import add_results, tracking_uri


@dataclass(frozen=True)
class Judge:
    run: tyro.conf.Positional[str]
    output: str = ""
    """Folder for all that is made; empty = RUN/judged."""
    robot: str = "embedded:robot"
    """Shards with real actions, for the curve over shares of episodes."""
    recipe: str = "tiny-adapt"
    """Of the adaptations."""
    shares: tuple[float, ...] = (0.05, 0.2, 1.0)
    clips: int = 32
    """Held-out clips for video metrics."""
    square_steps: int = 400
    """Steps of the adaptation to the drawn square, in which plans are made."""
    episodes: int = 10
    """Episodes that each model plans, for each of two seeds."""
    debug: bool = False


def main(argv: Sequence[str]) -> dict[str, Any]:
    began = time.monotonic()
    job = tyro.cli(Judge, args=argv, description=__doc__)
    output = storage.absolute(job.output or storage.join(job.run, "judged"))
    square, runs, plans, page = (storage.join(output, name) for name in ("square", "runs", "plans", "report.html"))
    config = read_run_config(job.run)
    tracking = ("--tracking.uri", tracking_uri(config))  # adaptations are tracked where the run was
    clips = ("--clips", str(job.clips), "--probe-clips", "64", "--output", storage.join(output, "evaluation"), "--workers", "2")
    told = {"evaluate": _step(output, "evaluate", job.run, *clips)}
    shares = ("--shares", *map(str, job.shares), "--data.mixture", job.robot, "1")
    told["shares"] = _step(output, "shares", job.run, job.recipe, *shares, "--output", runs, *tracking, of="adapt")
    told["square"] = _step(output, "square", "simulate", "--domain", "square", "--episodes", "400", "--output", square, of="pack")
    steps = ("--adapt.steps", str(job.square_steps), "--data.mixture", square, "1")
    told["adapt"] = _step(output, "adapt", job.run, job.recipe, *steps, "--output", runs, *tracking)
    size = ("--seeds", "0", "1", "--episodes", str(job.episodes), "--samples", "50", "--horizon", "6", "--sampler-steps", "2")
    told["plan"] = _step(output, "plan", "--models", storage.join(runs, told["adapt"]["run_id"]), *size, "--output", plans)
    folders = (told["evaluate"]["output"], told["shares"]["series"], plans)
    told["report"] = _step(output, "report", *folders, "--output", page)
    line = {"run": job.run, "output": output, "report": page} | {name: told["evaluate"][name] for name in ("figures", "probe")}
    line |= {"shares": told["shares"]["points"], "plans": told["plan"]["models"], "plan_pairs": told["plan"]["pairs"]}
    line["tracked"] = add_results(job.run, config, "", {"report/report.html": storage.read_bytes(page)}, {})
    seconds = {name: found["judge_seconds"] for name, found in told.items()}
    return line | {"seconds_by_step": seconds, "wall_seconds": round(time.monotonic() - began, 1)}


def _step(output: str, name: str, *options: str, of: str = "") -> dict[str, Any]:
    """What the job ``of`` (``name``, if not given) said in its last line, if need be after running it. Raises ``UserError`` where it fails."""
    kept = storage.join(output, "steps", f"{name}.json")
    if storage.exists(kept):
        found: dict[str, Any] = storage.read_json(kept)
        return found
    script = f"{of or name}.py"
    print(redact(f"\n== python jobs/{shlex.join([script, *options])}"), flush=True)
    began, last = time.monotonic(), ""
    with subprocess.Popen([sys.executable, Path(__file__).with_name(script), *options], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            print(last, end="", flush=True)
            last = line
    found = json.loads(last) if process.returncode == 0 else {}
    if found.get("status", "done") not in ("done", "finished") or not found:
        raise UserError(f"{name} did not finish (above it says why): mend that and give the same command; what is done is kept in {output}")
    found["judge_seconds"] = round(time.monotonic() - began, 1)
    storage.write_bytes(kept, json.dumps(found).encode())
    return found


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
