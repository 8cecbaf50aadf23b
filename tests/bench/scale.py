"""How far a run should go, on paper: 8 to 1024 GPUs, modelled and not measured. Prints tables, and one JSON line last.

    python tests/bench/scale.py [--recipes opensora wan] [--trials 200]

What the project counts or decides is taken from it: operations, memory and traffic from the planner (`cola_dist.train.estimate`), one ranged read
per clip, one block per rank and read, metrics from rank 0 alone, which ranks write and read which bytes of a checkpoint, when a checkpoint
counts, and how often a lost worker group is replaced. All else is an assumption and stands in `Assumptions`. A run keeps its clips per GPU, so
its global batch grows with its GPUs: whether it still learns as well is not asked here.

Goodput is simulated, and stands beside a closed form: `tests.bench.failures`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from cola_dist.config import RunConfig
from cola_dist.recipes import build_recipe
from cola_dist.train.estimate import ACCELERATORS, UTILISATION, PhasePlan, Plan, estimate, state_bytes, traffic_bytes
from tests.bench.failures import GIVEN_UP_AFTER, PERSON_S, Job, best_interval, daly_wall_s, goodput

GPUS = (8, 64, 512, 1024)
MTBF_DAYS = (1, 7, 30)
STEPS_PER_READ = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Assumptions:
    """What was neither measured here nor follows from the code. Bytes per second are one way."""

    accelerator: str = "h100"
    utilisation: float = UTILISATION
    gpus_per_node: int = 8
    network_per_gpu: float = 50e9
    """Eight 400 Gb/s ports per node."""
    host_copy_per_gpu: float = 5e9
    """From accelerator to host memory."""
    storage_per_node: float = 2.5e9
    """Object storage: 20 Gb/s per node, whatever the number of requests."""
    storage_in_all: float = 200e9
    storage_request_s: float = 0.03
    """One small request, one after another."""
    sha256_per_process: float = 1e9
    gloo_hop_s: float = 50e-6
    """One hop of the small sum that all ranks agree on after each step: a ring over TCP, 2 (N - 1) hops."""
    restart_s: float = 120.0
    """To notice that a worker is gone, place a new group on a node that is there at once, start processes and NCCL, and build the engine."""
    person_s: float = PERSON_S
    clip_bytes: float = 69e3
    """Measured on drawn videos of 10 s with a short side of 256 (RESULTS.md, the stream); 4 s of real video there would be 89 kB (keyframes)."""
    decode_s: float = 0.0246
    """Measured: 17 frames of 256 pixels, one thread of a slow core (RESULTS.md, keyframes)."""
    read_setup_s: float = 0.001
    """Ray Data, per read, before the first one starts (README, limits)."""
    clips_in_flight: float = 128e9
    """Host memory of a node for decoded clips that wait."""
    health_check_s: float = 2.0
    """Ray Train's controller asks each worker so often (its default)."""
    points_per_log: int = 23
    points_per_look: int = 43
    """Counted in a run of two sources."""


ASSUMED = Assumptions()


@dataclass(frozen=True)
class Size:
    """A recipe on so many GPUs: what the planner and the code say of it."""

    config: RunConfig
    plan: Plan
    gpus: int

    @property
    def joint(self) -> PhasePlan:
        """The phase in which everything trains: the longest and dearest."""
        return self.plan.phases[-1]

    @property
    def nodes(self) -> int:
        return -(-self.gpus // ASSUMED.gpus_per_node)

    @property
    def share(self) -> int:
        """Clips per GPU and step."""
        return self.config.optim.global_batch // self.config.train.workers

    @property
    def parameters(self) -> tuple[int, int]:
        """Trained and frozen in the joint phase."""
        trained = sum(self.plan.parameters[role] for role in self.joint.trains)
        return trained, sum(self.plan.parameters.values()) - trained

    def traffic(self) -> list[dict[str, float]]:
        """Bytes that one GPU sends per step at each ZeRO stage, and of them those that leave its node: ``flat`` in one ring over all GPUs,
        ``hierarchical`` within each node first and then, of each GPU's share, between nodes. At stage 3 the latter shards weights within a node only
        (MiCS, for which the project has no setting); at the others NCCL may choose it by itself."""
        (trained, frozen), rounds = self.parameters, self.share // (self.config.optim.micro_batch or self.share)
        inside = min(self.gpus, ASSUMED.gpus_per_node)
        flat = traffic_bytes(trained, frozen, self.gpus, rounds)
        within = traffic_bytes(trained, frozen, inside, rounds)
        between = traffic_bytes(trained, frozen, self.nodes, rounds)
        # At stage 3 no weights travel between nodes, and gradients as at stage 0.
        passes = (*between[:3], between[0])
        return [
            {
                "flat": flat[stage],
                "flat_network": flat[stage] / inside if self.nodes > 1 else 0.0,
                "hierarchical": within[stage] + passes[stage] / inside,
                "hierarchical_network": passes[stage] / inside,
            }
            for stage in range(4)
        ]

    def step_seconds(self, stage: int) -> float:
        """Operations, then traffic in one ring, then the small sum over all ranks; nothing overlaps."""
        accelerator, sent = ACCELERATORS[ASSUMED.accelerator], self.traffic()[stage]
        # The planner counts for the recipe's workers, whose clips per GPU are the same.
        compute = sum(self.joint.flops.values()) / self.config.train.workers / (accelerator.flops * ASSUMED.utilisation)
        network = sent["flat_network"] / ASSUMED.network_per_gpu
        inside = (sent["flat"] - sent["flat_network"]) / accelerator.link
        return compute + network + inside + 2 * (self.gpus - 1) * ASSUMED.gloo_hop_s

    def memory(self, stage: int) -> float:
        return state_bytes(*self.parameters, self.gpus)[stage] + self.joint.activations

    def stage(self) -> int:
        """The ZeRO stage with the shortest step, of two alike the smaller one, among those that leave a fifth of the memory free."""
        fits = [stage for stage in range(4) if self.memory(stage) < 0.8 * ACCELERATORS[ASSUMED.accelerator].memory]
        return min(fits, key=lambda stage: (self.step_seconds(stage), self.memory(stage)))

    def data(self, step_s: float) -> dict[str, float]:
        """Load on object storage and readers, with nothing kept from before."""
        clips = self.gpus * self.share / step_s
        decoded = self.config.data.frames * 3 * self.config.data.resolution**2
        return {
            "clips_per_s": clips,
            "storage_requests_per_s": clips,
            "storage_bytes_per_s": clips * ASSUMED.clip_bytes,
            "decoding_cores": clips * ASSUMED.decode_s,
            "object_store_bytes_per_s": clips * decoded,
        }

    def control(self, step_s: float, steps_per_read: int) -> dict[str, float]:
        """Load on what there is once."""
        diagnostics, tracking = self.config.diagnostics, self.config.tracking
        points = ASSUMED.points_per_log / tracking.log_every + ASSUMED.points_per_look / diagnostics.every
        return {
            "mlflow_points_per_s": points / step_s,
            "train_polls_per_s": self.gpus / ASSUMED.health_check_s,
            "read_tasks_per_s": self.gpus / (steps_per_read * step_s),
            "agreement_s": 2 * (self.gpus - 1) * ASSUMED.gloo_hop_s,
            "read_tasks": self.reads(steps_per_read),
        }

    def steps(self) -> int:
        return self.config.warmup.steps + self.config.joint.steps

    def reads(self, steps_per_read: int) -> int:
        """Read tasks of the whole plan: Ray Data makes all of them before the first one starts."""
        return self.gpus * -(-self.steps() // steps_per_read)

    def steps_per_read(self) -> int:
        """The fewest with which Ray Data is ready within a minute, as far as the memory for clips in flight allows."""
        data, kept = self.config.data, self.config.data.prefetch_reads + 2
        step_bytes = ASSUMED.gpus_per_node * self.share * data.frames * 3 * data.resolution**2
        allowed = [
            steps for steps in STEPS_PER_READ if steps == data.steps_per_read or kept * steps * step_bytes <= ASSUMED.clips_in_flight
        ]
        return next((steps for steps in allowed if self.reads(steps) * ASSUMED.read_setup_s <= 60), max(allowed))

    def checkpoint(self) -> dict[str, float]:
        """Bytes and seconds. Each rank copies, hashes and uploads its share; rank 0 then reads a line of each rank. At a restart every rank downloads
        and hashes every rank's file."""
        total, processes = self.plan.checkpoint_bytes, min(self.gpus, ASSUMED.gpus_per_node)
        storage = min(ASSUMED.storage_per_node, ASSUMED.storage_in_all / self.nodes)
        frozen = sum(size for role, size in self.plan.parameters.items() if role not in self.plan.phases[0].trains)
        return {
            "bytes": total,
            "bytes_per_node": total / self.nodes,
            "blocked_s": total / self.gpus / ASSUMED.host_copy_per_gpu,
            # Every rank hashes the weights of what is frozen while training waits.
            "blocked_in_warmup_s": 4 * frozen / ASSUMED.sha256_per_process,
            "write_s": total / self.nodes / storage
            + total / self.gpus / ASSUMED.sha256_per_process
            + self.gpus * ASSUMED.storage_request_s,
            "restart_reads_bytes": self.gpus * total,
            "restart_reads_s": processes * total / storage + total / ASSUMED.sha256_per_process,
        }

    def job(self, step_s: float, steps_per_read: int) -> Job:
        """With the recipe's interval and restarts."""
        saved = self.checkpoint()
        per_step = self.reads(steps_per_read) * ASSUMED.read_setup_s / self.steps()
        warmup = self.config.warmup.steps / self.steps()
        return Job(
            self.steps(),
            step_s,
            self.config.train.checkpoint_every,
            warmup * saved["blocked_in_warmup_s"] + (1 - warmup) * saved["blocked_s"],
            saved["write_s"],
            ASSUMED.restart_s + saved["restart_reads_s"],
            per_step,
            self.config.train.max_restarts,
        )


def row(size: Size, trials: int) -> dict[str, Any]:
    """All figures of one recipe on so many GPUs: as the recipe has it, and with the settings that come out as better."""
    configured, stage = size.config.train.zero_stage, size.stage()
    steps_per_read = size.steps_per_read()
    step_s = {"recipe": size.step_seconds(configured), "advised": size.step_seconds(stage)}
    as_recipe, advised = size.job(step_s["recipe"], size.config.data.steps_per_read), size.job(step_s["advised"], steps_per_read)
    runs: dict[str, Any] = {}
    for days in MTBF_DAYS:
        mtbf_s = days * 86400 / size.nodes
        job = replace(advised, every=best_interval(advised, mtbf_s))
        wall = min(daly_wall_s(job, mtbf_s), GIVEN_UP_AFTER * job.steps * job.step_s)
        # As many as come with four deviations more than expected, so that nobody is called.
        failures = wall / mtbf_s
        job = replace(job, max_restarts=math.ceil(failures + 4 * math.sqrt(failures) + 3))
        runs[str(days)] = {
            "recipe": goodput(as_recipe, mtbf_s, trials),
            "advised": goodput(job, mtbf_s, trials) | {"checkpoint_every": job.every, "max_restarts": job.max_restarts},
        }
    return {
        "recipe": size.config.recipe,
        "gpus": size.gpus,
        "step_s": step_s,
        "traffic_by_stage": size.traffic(),
        "memory_by_stage": [size.memory(stage) for stage in range(4)],
        "data": size.data(step_s["advised"]),
        "control": size.control(step_s["advised"], steps_per_read),
        "checkpoint": size.checkpoint(),
        "restart_s": {
            name: job.restart_s + job.restart_per_step_s * job.steps for name, job in (("recipe", as_recipe), ("advised", advised))
        },
        "advised": {"zero_stage": stage, "steps_per_read": steps_per_read},
        "goodput_by_mtbf_days": runs,
    }


LOAD = (
    "recipe, GPUs",
    "step (s), ZeRO 2 / advised",
    "a GPU sends per step, ZeRO 1 / 2 / 3 (GB)",
    "of it between nodes at ZeRO 1 and 3: flat, hierarchical (GB)",
    "reads/s",
    "from storage (GB/s)",
    "decoding cores",
    "through Ray's object store (GB/s)",
    "read tasks/s",
    "MLflow points/s",
    "a checkpoint counts after (s)",
    "read at a restart (TB)",
    "restart (s), recipe / advised",
)
FAILURES = (
    *("recipe, GPUs", "a node fails every", "goodput, recipe", "a person is called", "goodput, advised", "Daly"),
    *("checkpoint_every", "max_restarts", "zero_stage", "steps_per_read"),
)


def tables(rows: list[dict[str, Any]]) -> str:
    """What stands in cluster/README.md."""
    load, failures = [], []
    for r in rows:
        sent, saved, data, name = r["traffic_by_stage"], r["checkpoint"], r["data"], f"{r['recipe']}, {r['gpus']}"
        load.append(
            (
                name,
                f"{r['step_s']['recipe']:.2f} / {r['step_s']['advised']:.2f}",
                " / ".join(f"{sent[stage]['flat'] / 1e9:.1f}" for stage in (1, 2, 3)),
                "; ".join(f"{sent[stage]['flat_network'] / 1e9:.2f}, {sent[stage]['hierarchical_network'] / 1e9:.2f}" for stage in (1, 3)),
                f"{data['storage_requests_per_s']:,.0f}",
                f"{data['storage_bytes_per_s'] / 1e9:.2f}",
                f"{data['decoding_cores']:,.0f}",
                f"{data['object_store_bytes_per_s'] / 1e9:.1f}",
                f"{r['control']['read_tasks_per_s']:.1f}",
                f"{r['control']['mlflow_points_per_s']:.1f}",
                f"{saved['write_s']:.0f}",
                f"{saved['restart_reads_bytes'] / 1e12:.1f}",
                f"{r['restart_s']['recipe']:,.0f} / {r['restart_s']['advised']:,.0f}",
            )
        )
        for days, run in r["goodput_by_mtbf_days"].items():
            recipe, advised = run["recipe"], run["advised"]
            ends = recipe["simulated"] > 0
            asked = (f"{recipe['simulated']:.2f}", f"{recipe['calls']:.1f} times") if ends else ("does not end", "–")
            figures = (f"{advised['simulated']:.3f}", f"{advised['closed_form']:.3f}")
            settings = (advised["checkpoint_every"], advised["max_restarts"], r["advised"]["zero_stage"], r["advised"]["steps_per_read"])
            failures.append((name, f"{days} d", *asked, *figures, *map(str, settings)))
    return f"{_markdown(LOAD, load)}\n\n{_markdown(FAILURES, failures)}"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _plain(value: Any) -> Any:
    """Four digits, and null for what has no end."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["opensora", "wan"])
    parser.add_argument("--trials", type=int, default=200)
    args = parser.parse_args()
    rows = []
    for name in args.recipes:
        config = build_recipe(name)
        plan = estimate(config)
        rows += [row(Size(config, plan, gpus), args.trials) for gpus in GPUS]
    print(tables(rows))
    print(json.dumps({"bench": "scale", "modelled": True, "trials": args.trials, "assumed": asdict(ASSUMED), "rows": _plain(rows)}))


if __name__ == "__main__":
    main()
