"""What orchestration costs, and what the frozen generator saves. Prints one JSON line last.

    python tests/bench/bench_overhead.py [--rounds 2] [--steps 160]

Three things, measured on this machine in alternation, on CPU, workers of one thread each: two of them, as in the demo, and one. On two cores two
workers leave nothing to whatever else runs; one worker leaves a core, as accelerators leave the host's cores.

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
from cola_dist.methods import Clips, Course, build_method, phases
from cola_dist.recipes import tiny
from cola_dist.train import hardware
from cola_dist.train.engine import Engine
from cola_dist.train.rates import learning_rates

ROOT = Path(__file__).resolve().parents[2]
SKIPPED = 60
"""Steps of each phase of the recipe that are left out: workers start, and readers decode each episode for the first time."""
SKIPPED_LARGE = 5
"""The same for the paper's proportions, whose clips lie in memory."""


def bare_rank(rank: int, config: RunConfig, phase_index: int, port: int, skipped: int, out: str) -> None:
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
        engine.step([pool[step % len(pool)]], first + step, learning_rates(first + step, Course(phases(config)).spans, config.optim))
        seconds.append(time.perf_counter() - began)
    dist.barrier()
    if rank == 0:
        kept = seconds[skipped:]
        figures = {
            "steps_per_s": len(kept) / sum(kept),
            "step_seconds": statistics.median(kept),
            "peak_bytes": hardware.peak_memory_bytes(device) - libraries,
        }
        Path(out).write_text(json.dumps(figures))
    dist.destroy_process_group()


def bare(config: RunConfig, phase_index: int, port: int, skipped: int = SKIPPED) -> dict[str, float]:
    """Run the bare loop in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        mp.spawn(bare_rank, args=(config, phase_index, port, skipped, out), nprocs=config.train.workers)
        figures: dict[str, float] = json.loads(Path(out).read_text())
        return figures


def full(config: RunConfig) -> dict[str, Any]:
    """Run the job as a user does and return steps/s of its warm-up and joint phases, from the trace of step times that MLflow got."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "jobs" / "cotrain.py"), "tiny", "--output", folder, "--world.pretrained", "None"]
        command += ["--warmup.steps", str(config.warmup.steps), "--joint.steps", str(config.joint.steps)]
        command += [
            "--train.workers",
            str(config.train.workers),
            "--train.checkpoint-every",
            "100000",
            "--diagnostics.every",
            "100000",
            "--diagnostics.video-clips",
            "0",
        ]
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
        warmup=replace(config.warmup, steps=SKIPPED_LARGE + 15),
        joint=replace(config.joint, steps=SKIPPED_LARGE + 15),
    )


def ratios(fulls: list[dict[str, float]], bares: list[list[dict[str, float]]]) -> dict[str, float]:
    """Steps/s of the full job over those of the bare loop, by phase: the median over rounds."""
    return {
        phase: statistics.median(full[phase] / bare[index]["steps_per_s"] for full, bare in zip(fulls, bares, strict=True))
        for index, phase in enumerate(("warmup", "joint"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=160, help="per phase of the recipe, a multiple of 10")
    args = parser.parse_args()
    base = tiny()
    base = replace(
        base,
        world=replace(base.world, pretrained=None),
        warmup=replace(base.warmup, steps=args.steps),
        joint=replace(base.joint, steps=args.steps),
    )
    configs = {workers: replace(base, train=replace(base.train, workers=workers)) for workers in (2, 1)}
    fulls: dict[int, list[dict[str, float]]] = {2: [], 1: []}
    bares: dict[int, list[list[dict[str, float]]]] = {2: [], 1: []}
    papers = []
    port = 21000 + os.getpid() % 10000
    for number in range(args.rounds):
        for workers, config in configs.items():
            bares[workers].append([bare(config, phase, port + 10 * number + phase) for phase in (0, 1)])
            fulls[workers].append(full(config))
            print(
                json.dumps({"round": number, "workers": workers, "full": fulls[workers][-1], "bare": bares[workers][-1]}),
                file=sys.stderr,
                flush=True,
            )
        papers.append([bare(paper_proportions(base), phase, port + 10 * number + 4 + phase, SKIPPED_LARGE) for phase in (0, 1)])
        print(json.dumps({"round": number, "paper": papers[-1]}), file=sys.stderr, flush=True)
    line = {"bench": "overhead", "rounds": args.rounds, "steps_per_phase": args.steps}
    for workers in configs:
        for index, phase in enumerate(("warmup", "joint")):
            line[f"bare_steps_per_s_{phase}_{workers}_workers"] = statistics.median(b[index]["steps_per_s"] for b in bares[workers])
    line |= {f"full_over_bare_{phase}_{w}_workers": r for w in configs for phase, r in ratios(fulls[w], bares[w]).items()}
    for name, pairs in (("tiny", bares[2]), ("paper_proportions", papers)):
        line[f"warmup_over_joint_seconds_{name}"] = statistics.median(p[0]["step_seconds"] / p[1]["step_seconds"] for p in pairs)
        line[f"warmup_over_joint_peak_bytes_{name}"] = statistics.median(p[0]["peak_bytes"] / p[1]["peak_bytes"] for p in pairs)
    print(json.dumps(line))


if __name__ == "__main__":
    main()
