"""What a plan is judged by: how near its imagined frames come to the goal picture and, if asked for, what a success classifier says of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

GOAL_WEIGHT, CLASSIFIER_WEIGHT = 0.5, 10.0
"""VP2's (arXiv 2304.13723)."""
_VALUES = 64 * 64 * 3
"""VP2's frames: an error is counted as if every picture had their size, so that models of any resolution are judged alike."""
_BATCH, _RATE = 64, 1e-3
_TEST_SHARE = 0.2


def resized(frames: Tensor, side: int) -> Tensor:
    """uint8 frames ``[..., 3, H, W]`` to fp32 ``[..., 3, side, side]`` in [0, 1]: mean over areas where that is smaller."""
    values = frames.float() / 255
    if side == frames.shape[-1]:
        return values
    flat = F.interpolate(values.reshape(-1, *frames.shape[-3:]), (side, side), mode="area" if side < frames.shape[-1] else "bilinear")
    return flat.reshape(*frames.shape[:-2], side, side)


class SuccessClassifier(nn.Module):
    """A small residual network on single frames of ``side`` pixels: logit that the task is done."""

    def __init__(self, side: int, width: int = 32) -> None:
        super().__init__()
        self.side = side
        self.first = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(_Residual(width) for _ in range(2))
        # Where things are matters, so places are kept apart.
        self.last = nn.Linear(width * 4 * 4, 1)

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 frames ``[M, 3, H, W]`` to logits ``[M]``."""
        x = self.first(resized(frames, self.side) - 0.5)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.last(F.adaptive_avg_pool2d(x, 4).flatten(1))
        return logits[:, 0]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.max_pool2d(x + self.layers(x), 2)
        return out


def train_classifier(
    frames: NDArray[np.uint8], done: NDArray[np.bool_], side: int, seed: int, steps: int = 300
) -> tuple[SuccessClassifier, float]:
    """A classifier of frames ``[M, H, W, 3]`` by binary cross-entropy, and its accuracy on the last fifth of them, which it has not seen."""
    pictures = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    labels = torch.from_numpy(done).float()
    kept = len(labels) - max(1, round(_TEST_SHARE * len(labels)))
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SuccessClassifier(side)
    optimizer = torch.optim.Adam(model.parameters(), lr=_RATE)
    for _ in range(steps):
        rows = torch.randint(kept, (_BATCH,), generator=generator)
        loss = F.binary_cross_entropy_with_logits(model(pictures[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    right = (model(pictures[kept:]) > 0) == (labels[kept:] > 0)
    return model, float(right.float().mean())


@dataclass(frozen=True)
class Objective:
    """VP2's reward: -0.5 times the sum of squared errors to the goal, over all imagined frames, plus 10 times the sum of the classifier's logits."""

    goal: Tensor
    """uint8 ``[3, H, W]``."""
    classifier: SuccessClassifier | None = None

    def __call__(self, frames: Tensor) -> Tensor:
        """Reward ``[S]`` fp32 of imagined frames uint8 ``[S, H, 3, h, w]``; the goal is brought to their size."""
        goal = resized(self.goal[None].to(frames.device), frames.shape[-1])
        error = (resized(frames, frames.shape[-1]) - goal).square().mean((2, 3, 4)) * _VALUES
        reward = -GOAL_WEIGHT * error.sum(1)
        if self.classifier is not None:
            logits: Tensor = self.classifier(frames.flatten(0, 1)).unflatten(0, frames.shape[:2])
            reward = reward + CLASSIFIER_WEIGHT * logits.sum(1)
        return reward
