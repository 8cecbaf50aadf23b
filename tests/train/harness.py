"""Runs the training loop in plain processes, without Ray, on toy data."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cola_dist.config import RunConfig
from cola_dist.data.stream import Batch, ClipReader, StreamPlan
from cola_dist.models.autoencoder import PixelAutoencoder
from cola_dist.recipes import RECIPES
from cola_dist.settings import apply_overrides
from cola_dist.train.session import run_worker
from cola_dist.train.worker import LocalWorker, Wish
from tests.toy import write_folder


def toy_config(folder: Path, *options: str, recipe: str = "tiny") -> RunConfig:
    """A run of seconds: one small robot and one small hand source, 4 warm-up and 4 joint steps, a generator with random weights."""
    for name, actions, seed in (("robot", True, 0), ("hand", False, 1)):
        if not (folder / name).exists():
            write_folder(folder / name, name, actions=actions, seed=seed)
    base = RECIPES[recipe]()
    base = replace(
        base,
        output=str(folder / "runs"),
        data=replace(base.data, mixture={str(folder / "robot"): 0.5, str(folder / "hand"): 0.5}, mixture_block=8, steps_per_read=2),
        lam=replace(base.lam, width=16, depth=1, heads=2, bottleneck=replace(base.lam.bottleneck, codes=8, dim=4)),
        conditioning=replace(base.conditioning, depth=1, width=16, heads=2),
        world=replace(base.world, pretrained=None, width=16, depth=2, heads=2),
        warmup=replace(base.warmup, steps=4 if base.method == "cotrain" else 0),
        joint=replace(base.joint, steps=4),
        optim=replace(base.optim, global_batch=8, lr_warmup_steps=2),
        train=replace(base.train, checkpoint_every=2),
        diagnostics=replace(base.diagnostics, every=4, grace_steps=0, clips=8, batch=4, video_clips=2, video_every=4, probe_clips=0),
        tracking=replace(base.tracking, log_every=1),
    )
    return apply_overrides(base, options)


class DisturbedWorker(LocalWorker):
    """A worker whose user asks to stop at a step, ``stop_at`` < 0 never, and that is given clips which are lost."""

    stop_at = -1
    lost = frozenset[int]()

    def batches(self, reader: ClipReader, plan: StreamPlan) -> Iterator[Batch]:
        for batch in super().batches(reader, plan):
            latents = PixelAutoencoder().encode(torch.tensor(batch.video)).numpy() if self.lost else None
            if latents is not None:
                latents[[position in self.lost for position in batch.position.tolist()]] = np.nan
            yield replace(batch, latents=latents)

    def report(self, progress: Mapping[str, Any]) -> Wish:
        return "stop" if progress["step"] >= self.stop_at >= 0 else "go on"


def run_local(config: RunConfig, run_uri: Path, stop_at: int = -1, lost: frozenset[int] = frozenset()) -> dict[str, Any]:
    """Train with ``config.train.workers`` processes; returns rank 0's result. Clips at the positions ``lost`` have latents that are no numbers."""
    world = config.train.workers
    port = 20000 + os.getpid() % 20000
    if world == 1:
        return _run(0, {str(run_uri): config}, stop_at, lost, port)
    mp.spawn(_run, args=({str(run_uri): config}, stop_at, lost, port), nprocs=world)
    return json.loads((run_uri / "result.json").read_text())


def run_in_turn(runs: Mapping[Path, RunConfig]) -> None:
    """Train one after another in the same processes, which take longer to start than to train. All runs have as many workers as the first."""
    port = 20000 + os.getpid() % 20000
    configs = {str(uri): config for uri, config in runs.items()}
    mp.spawn(_run, args=(configs, -1, frozenset(), port), nprocs=next(iter(runs.values())).train.workers)


def _run(rank: int, runs: Mapping[str, RunConfig], stop_at: int, lost: frozenset[int], port: int) -> dict[str, Any]:
    """Returns what the last run gives."""
    world = next(iter(runs.values())).train.workers
    os.environ["LOCAL_RANK"] = str(rank)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    worker = DisturbedWorker(torch.device("cpu"), rank, world)
    worker.stop_at, worker.lost = stop_at, lost
    try:
        return [run_worker(config, run_uri, worker) for run_uri, config in runs.items()][-1]
    finally:
        if world > 1:
            dist.destroy_process_group()
