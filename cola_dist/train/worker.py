"""What the loop needs from whoever runs it. Ray Train is one such host (`cola_dist.train.launch`); one plain process is another."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.distributed as dist

from cola_dist.data.order import rank_positions
from cola_dist.data.stream import Batch, ClipReader, StreamPlan
from cola_dist.redact import redact
from cola_dist.train.hardware import compute_clock
from cola_dist.train.meters import Meters, NullMeters

Wish = Literal["go on", "save", "stop"]
"""What is asked of a run in its midst: nothing, a checkpoint now, or a checkpoint and the end."""


class Worker(Protocol):
    """One process of the training group, with ``torch.distributed`` initialised."""

    rank: int
    world: int
    device: torch.device
    meters: Meters
    """Where this rank's figures go while the run goes on."""

    def batches(self, reader: ClipReader, plan: StreamPlan) -> Iterator[Batch]:
        """This rank's batch of each step of the plan."""

    def clock(self) -> float:
        """Seconds of which differences are accelerator time, read right before and after each step."""

    def report(self, progress: Mapping[str, Any]) -> Wish:
        """Show progress to the user; returns what is asked for. Cheap enough for every step."""

    def tell(self, line: str) -> None:
        """Tell the user something that stops nothing."""


@dataclass
class LocalWorker:
    """The only worker, in this process, reading its clips itself: for machines without Ray, and for measuring the loop alone."""

    device: torch.device
    rank: int = 0
    world: int = 1
    meters: Meters = field(default_factory=NullMeters)

    def __post_init__(self) -> None:
        if not dist.is_initialized():
            rendezvous = Path(tempfile.mkdtemp(prefix="cola-rendezvous-")) / "store"
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)

    def batches(self, reader: ClipReader, plan: StreamPlan) -> Iterator[Batch]:
        """Read and decode in this process, step by step."""
        for step in range(plan.first_step, plan.last_step):
            yield reader.read_many(rank_positions(step, plan.global_batch, self.rank, self.world))

    def clock(self) -> float:
        """`hardware.compute_clock` of the device."""
        return compute_clock(self.device)

    def report(self, progress: Mapping[str, Any]) -> Wish:
        """Print a line at each evaluation."""
        if progress.get("verdict_at") == progress.get("step"):
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in progress.items()}, flush=True)
        return "go on"

    def tell(self, line: str) -> None:
        """Print the line to stderr."""
        print(redact(line), file=sys.stderr, flush=True)
