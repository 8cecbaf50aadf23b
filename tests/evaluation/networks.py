"""Small TorchScript networks with the call conventions of FVD's and LPIPS's. Their weights are random: no figure here is an FVD or LPIPS."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn


class Features(nn.Module):
    """As ``i3d_torchscript.pt`` is called, to ``width`` features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.map = nn.Linear(3 * 4 * 4 * 4, width)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert not rescale
        assert not resize
        assert return_features
        assert x.shape[3] == 224
        assert float(x.min()) >= -1.0
        return self.map(nn.functional.adaptive_avg_pool3d(x, (4, 4, 4)).flatten(1))


class Distance(nn.Module):
    """As a traced ``lpips.LPIPS`` is called; here the mean absolute difference. Its answer is ``[B, 1, 1, 1]``."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3), keepdim=True)


def save(network: nn.Module, path: Path) -> str:
    torch.jit.script(network).save(str(path))
    return str(path)


def fvd_network(path: Path, width: int = 400) -> str:
    torch.manual_seed(0)
    return save(Features(width), path)


def lpips_network(path: Path) -> str:
    return save(Distance(), path)
