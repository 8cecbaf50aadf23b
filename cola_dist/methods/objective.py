"""Optional terms of the co-training loss, each 0 in the faithful baseline."""

from __future__ import annotations

import torch
from torch import Tensor


def motion_weights(x0: Tensor, strength: float) -> Tensor:
    """Weight of each place of the latents ``x0 [B, L, C, h, w]``: ``[B, L, 1, h, w]`` fp32, mean 1 over a clip's places.

    ``1 + strength * change / (the clip's mean change)``, scaled to mean 1; change is the mean absolute difference from the frame before over
    channels, 0 in the first frame. A clip that stands still weighs 1 everywhere. After DWS' motion-reinforced loss, which weighs what moves.
    """
    change = torch.zeros_like(x0[:, :, :1], dtype=torch.float32)
    change[:, 1:] = (x0[:, 1:].float() - x0[:, :-1].float()).abs().mean(2, keepdim=True)
    weight = 1 + strength * change / change.mean((1, 2, 3, 4), keepdim=True).clamp(min=1e-6)
    return weight / weight.mean((1, 2, 3, 4), keepdim=True)


def ranking_loss(own: Tensor, other: Tensor, margin: float) -> Tensor:
    """max(0, margin - (other - own) / own), mean over clips; ``own`` and ``other [B]`` are flow losses with the clip's own and another's actions.

    The loss in the denominator is detached: the term must not be lowered by predicting worse. PreLAR's ranking loss, made free of scale.
    """
    scale = own.detach().clamp(min=1e-12)
    return (margin - (other - own) / scale).clamp(min=0).mean()
