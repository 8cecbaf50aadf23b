"""What orchestration costs, and what the frozen generator saves. Prints one JSON line last.

    python tests/bench/bench_overhead.py [--rounds 2] [--steps 120]

Three things, measured on this machine in alternation, on CPU, two workers of one thread each:

- ``full``: ``jobs/cotrain.py`` on the embedded default: Ray Data, Ray Train, DeepSpeed, MLflow, checkpoints off, looks at held-out clips off.
- ``bare``: torch and DeepSpeed alone over batches of the same shapes that lie in memory, two processes, no Ray.
- warm-up against joint: the bare loop's step times and peak memory (above what the libraries take) in each phase, for the recipe and for
  the paper's proportions of the two roles.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cola_dist.config import RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.recipes import tiny
from cola_dist.train import hardware
from cola_dist.train.engine import Engine
from cola_dist.train.rates import learning_rates

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 10
"""Steps of each phase that are left out: caches fill and workers start."""


def bare_rank(rank: int, config: RunConfig, phase_index: int, port: int, out: str) -> None:
    """One rank of the bare loop over one phase; rank 0 writes steps/s and the step's median seconds and peak memory."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=config.train.workers)
    device = torch.device("cpu")
    hardware.prepare(config.train, device)
    libraries = hardware.peak_memory_bytes(device)
    phase = phases(config)[phase_index]
    engine = Engine(build_method(config, bf16=False), phase, config.optim, config.train, device)
    share = config.optim.global_batch // config.train.workers
    draw = torch.Generator().manual_seed(rank)
    shape = (share, config.data.frames, 3, config.data.resolution, config.data.resolution)
    pool = []
    for number in range(8):
        position = torch.arange(share) + share * (config.train.workers * number + rank)
        pool.append(Clips(torch.randint(0, 256, shape, dtype=torch.uint8, generator=draw), position, position % 2))
    first = sum(p.steps for p in phases(config)[:phase_index])
    seconds = []
    for step in range(phase.steps):
        began = time.perf_counter()
        engine.step([pool[step % len(pool)]], first + step, learning_rates(first + step, phases(config), config.optim))
        seconds.append(time.perf_counter() - began)
    dist.barrier()
    if rank == 0:
        kept = seconds[SKIPPED:]
        figures = {
            "steps_per_s": len(kept) / sum(kept),
            "step_seconds": statistics.median(kept),
            "peak_bytes": hardware.peak_memory_bytes(device) - libraries,
        }
        Path(out).write_text(json.dumps(figures))
    dist.destroy_process_group()


def bare(config: RunConfig, phase_index: int, port: int) -> dict[str, float]:
    """Run the bare loop in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        mp.spawn(bare_rank, args=(config, phase_index, port, out), nprocs=config.train.workers)
        figures: dict[str, float] = json.loads(Path(out).read_text())
        return figures


def full(config: RunConfig) -> dict[str, Any]:
    """Run the job as a user does and return steps/s of its warm-up and joint phases, from the trace of step times that MLflow got."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "jobs" / "cotrain.py"), "tiny", "--output", folder, "--world.pretrained", "None"]
        command += ["--warmup.steps", str(config.warmup.steps), "--joint.steps", str(config.joint.steps)]
        command += ["--train.checkpoint-every", "100000", "--diagnostics.every", "100000", "--diagnostics.video-clips", "0"]
        command += ["--diagnostics.probe-clips", "0", "--diagnostics.clips", "32"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        events = next(Path(folder).glob("*/tracking/events.jsonl")).read_text().splitlines()
        return phase_rates([json.loads(line) for line in events], config)


def phase_rates(events: list[dict[str, Any]], config: RunConfig) -> dict[str, float]:
    """Steps/s between the log lines of each phase, the first ``SKIPPED`` steps left out: wall time, with all that happens between steps."""
    times = {e["step"]: e["time"] / 1000 for e in events if "train/loss" in e.get("metrics", {})}
    edges = {"warmup": (SKIPPED, config.warmup.steps), "joint": (config.warmup.steps + SKIPPED, config.warmup.steps + config.joint.steps)}
    return {name: (last - first) / (times[last] - times[first]) for name, (first, last) in edges.items()}


def paper_proportions(config: RunConfig) -> RunConfig:
    """A generator of 4.7 times the role "lam", as the paper's 0.9 B to 0.12 B (inverse dynamics) + 74 M (conditioning), and wide enough that
    multiplying matrices is most of its work, as it is there."""
    return replace(
        config,
        lam=replace(config.lam, width=192, depth=3, heads=2),
        conditioning=replace(config.conditioning, depth=1, width=96, heads=2),
        world=replace(config.world, pretrained=None, width=384, depth=10, heads=4),
        optim=replace(config.optim, global_batch=16),
        warmup=replace(config.warmup, steps=SKIPPED + 20),
        joint=replace(config.joint, steps=SKIPPED + 20),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120, help="per phase, a multiple of 10")
    args = parser.parse_args()
    rounds, steps = args.rounds, args.steps
    base = tiny()
    base = replace(
        base,
        world=replace(base.world, pretrained=None),
        warmup=replace(base.warmup, steps=steps),
        joint=replace(base.joint, steps=steps),
    )
    fulls, bares, papers = [], [], []
    for number in range(rounds):
        port = 21000 + os.getpid() % 10000 + 10 * number
        bares.append([bare(base, phase, port + phase) for phase in (0, 1)])
        fulls.append(full(base))
        papers.append([bare(paper_proportions(base), phase, port + 4 + phase) for phase in (0, 1)])
        print(json.dumps({"round": number, "full": fulls[-1], "bare": bares[-1], "paper": papers[-1]}), file=sys.stderr, flush=True)
    line = {
        "bench": "overhead",
        "rounds": rounds,
        "steps_per_phase": steps,
        "full_steps_per_s": {p: statistics.median(f[p] for f in fulls) for p in ("warmup", "joint")},
        "bare_steps_per_s": {p: statistics.median(b[i]["steps_per_s"] for b in bares) for i, p in enumerate(("warmup", "joint"))},
        "full_over_bare_warmup": statistics.median(f["warmup"] / b[0]["steps_per_s"] for f, b in zip(fulls, bares, strict=True)),
        "full_over_bare_joint": statistics.median(f["joint"] / b[1]["steps_per_s"] for f, b in zip(fulls, bares, strict=True)),
        "warmup_over_joint_seconds_tiny": statistics.median(b[0]["step_seconds"] / b[1]["step_seconds"] for b in bares),
        "warmup_over_joint_seconds_paper_proportions": statistics.median(p[0]["step_seconds"] / p[1]["step_seconds"] for p in papers),
        "warmup_over_joint_peak_bytes_tiny": statistics.median(b[0]["peak_bytes"] / b[1]["peak_bytes"] for b in bares),
        "warmup_over_joint_peak_bytes_paper_proportions": statistics.median(p[0]["peak_bytes"] / p[1]["peak_bytes"] for p in papers),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
