from __future__ import annotations

import torch

from cola_dist.methods import Clips, Method


def awaken(method: Method, seed: int = 0) -> None:
    """Move every weight off its start, the zero-initialised layers above all."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def part(clips: Clips, rows: slice) -> Clips:
    return Clips(clips.video[rows], clips.position[rows], clips.source[rows])
