"""The ridge solver that the probe and the alignment share."""

from __future__ import annotations

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-3, 4))
"""Ridge penalties tried, per row."""


def standardised(values: Tensor, fit: Tensor) -> Tensor:
    """``values [M, F]`` by the mean and standard deviation of the rows where ``fit [M]`` is true; 0 in columns that do not vary there."""
    mean, std = values[fit].mean(0), values[fit].std(0, correction=0)
    return torch.where(std > 1e-8, (values - mean) / std.clamp(min=1e-8), 0.0)


def solve(x: Tensor, y: Tensor, penalty: float) -> Tensor:
    """Weights ``[F, Q]`` that minimise ``|x w - y|^2 / M + penalty |w|^2`` for ``x [M, F]``, ``y [M, Q]``; no intercept."""
    gram = x.T @ x + penalty * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    weights: Tensor = torch.linalg.solve(gram, x.T @ y)
    return weights
