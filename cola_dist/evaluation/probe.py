"""A ridge probe from latent-action codes to true actions, always beside its controls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_dist.config import RunConfig
from cola_dist.diagnostics.ridge import PENALTIES, solve, standardised
from cola_dist.models.autoencoder import to_pixels
from cola_dist.models.lam import LatentActionModel


@dataclass(frozen=True)
class ProbeScore:
    """How well a ridge map predicts the held-out actions."""

    r2: float
    """Share of variance explained, mean over action dimensions that vary; about 0 for features that say nothing."""
    l1: float
    """Mean absolute error in standard deviations of the action dimension."""
    penalty: float
    """Ridge penalty per row, chosen on episodes inside the training part."""


def _r2(prediction: Tensor, target: Tensor, reference: Tensor) -> float:
    residual = (target - prediction).square().sum(0)
    total = (target - reference).square().sum(0)
    varies = total > 1e-12
    return float((1 - residual[varies] / total[varies]).mean()) if varies.any() else 0.0


def ridge_probe(features: Tensor, actions: Tensor, episode: Tensor, heldout: Tensor) -> ProbeScore:
    """Fit on the rows where ``heldout [M]`` is false, score on the rest.

    ``features [M, F]`` and ``actions [M, A]`` are standardised by the fitted part (a feature or action that does not vary there counts as
    0). The penalty is chosen on every fifth of the fitted ``episode [M]`` numbers. Raises `ValueError` with fewer than two fitted
    episodes or no held-out row.
    """
    fit = ~heldout
    known = episode[fit].unique()
    if len(known) < 2 or not heldout.any():
        raise ValueError(f"a probe needs two fitted episodes and a held-out row, not {len(known)} and {int(heldout.sum())}")
    x, y = features.double(), actions.double()
    x = standardised(x, fit)
    y = standardised(y, fit)
    inner = fit & torch.isin(episode, known[::5])
    rest = fit & ~inner
    scores = [_r2(x[inner] @ solve(x[rest], y[rest], penalty), y[inner], y[rest].mean(0)) for penalty in PENALTIES]
    penalty = PENALTIES[max(range(len(scores)), key=scores.__getitem__)]
    prediction = x[heldout] @ solve(x[fit], y[fit], penalty)
    return ProbeScore(_r2(prediction, y[heldout], y[heldout].mean(0)), float((prediction - y[heldout]).abs().mean()), penalty)


def probe_with_controls(
    features: Mapping[str, Tensor], actions: Tensor, episode: Tensor, heldout: Tensor, seed: int
) -> dict[str, ProbeScore]:
    """`ridge_probe` of each entry of ``features``, and as ``permuted`` that of the first entry to actions shuffled over the fitted rows."""
    scores = {name: ridge_probe(rows, actions, episode, heldout) for name, rows in features.items()}
    rows = torch.nonzero(~heldout).flatten()
    shuffled = actions.clone()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).to(rows.device)
    shuffled[rows] = actions[rows[order]]
    return scores | {"permuted": ridge_probe(next(iter(features.values())), shuffled, episode, heldout)}


@torch.no_grad()
def code_features(lam: LatentActionModel, video: Tensor, batch: int = 64) -> Tensor:
    """What the latent action of each transition of ``video`` uint8 ``[B, T, 3, H, W]`` says, ``[B*(T-1), F]``: see `Bottleneck.features`."""
    return torch.cat([lam.bottleneck.features(lam.infer(to_pixels(part))[1]) for part in video.split(batch)])


@torch.no_grad()
def codes_of(lam: LatentActionModel, video: Tensor, batch: int = 64) -> Tensor:
    """int64 ``[B*(T-1), N]`` codes of each transition of ``video`` uint8 ``[B, T, 3, H, W]``; N = 0 where the bottleneck has none."""
    return torch.cat([lam.infer(to_pixels(part))[1].codes.flatten(0, 1) for part in video.split(batch)])


def difference_features(video: Tensor, grid: int = 8) -> Tensor:
    """What the pixels alone say: the signed change of each transition of uint8 ``[B, T, 3, H, W]``, averaged over ``grid x grid`` cells."""
    pixels = to_pixels(video)
    change = (pixels[:, 1:] - pixels[:, :-1]).flatten(0, 1)
    return F.adaptive_avg_pool2d(change, grid).flatten(1)


@torch.no_grad()
def untrained_lam(config: RunConfig, video: Tensor) -> LatentActionModel:
    """The control of the same architecture with random weights; its codes lie on its own z of ``video``, or it would use few of them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed + 2)
        lam = LatentActionModel(config.lam, config.train.seed).to(video.device)
    lam.bottleneck.place(lam.idm(to_pixels(video)).flatten(0, 2))
    return lam
