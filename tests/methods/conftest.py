from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_dist.config import ConditioningConfig, JointConfig, LamConfig, RunConfig, WarmupConfig, WorldConfig
from cola_dist.methods import Clips
from cola_dist.recipes import tiny


@pytest.fixture
def config() -> RunConfig:
    base = tiny()
    return replace(
        base,
        data=replace(base.data, resolution=16),
        lam=LamConfig(patch=8, width=16, depth=1, heads=2),
        conditioning=ConditioningConfig(depth=1, width=16, heads=2, dropout=0.3),
        world=WorldConfig(patch=8, width=16, depth=2, heads=2),
        warmup=WarmupConfig(steps=3, lr_lam=1e-3),
        joint=JointConfig(steps=2, lr_lam=1e-3, lr_world=1e-3),
    )


@pytest.fixture
def clips() -> Clips:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (6, 5, 3, 16, 16), dtype=torch.uint8, generator=generator)
    return Clips(video, torch.tensor([5, 900, 12, 13, 14, 10_000_000_000]), torch.tensor([0, 1, 0, 1, 2, 0]))
