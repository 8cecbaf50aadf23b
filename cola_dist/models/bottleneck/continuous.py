"""Continuous latent actions: the bottleneck of a beta-VAE (Higgins et al. 2017), as in AdaWorld (arXiv 2503.18938)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.base import Bottleneck, Quantised

_START_LOG_VARIANCE = -6.0
"""Standard deviation e^-3 = 0.05 at the start: noise as large as z would hide the actions before anything has learnt to read them."""


class ContinuousLatents(Bottleneck):
    """z is the mean, a linear head on it the log-variance of a normal distribution; training samples it, evaluation takes the mean.

    ``loss`` is ``beta`` times the divergence from N(0, 1), 0.5 (mean^2 + variance - 1 - log variance), as a mean over elements. There are no codes.
    """

    samples = True

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(codes=0)
        self.beta = config.beta
        self.log_variance = nn.Linear(config.dim, config.dim)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.constant_(self.log_variance.bias, _START_LOG_VARIANCE)

    def forward(self, z: Tensor, step: int | None = None, noise: Tensor | None = None) -> Quantised:
        """mean + std * ``noise``, or the mean where no noise is given."""
        with torch.autocast(z.device.type, enabled=False):
            mean = z.float()
            log_variance = self.log_variance(mean)
            kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
            actions = mean if noise is None else mean + (0.5 * log_variance).exp() * noise
            codes = torch.empty(*z.shape[:2], 0, dtype=torch.int64, device=z.device)
            none = torch.zeros_like(kl)
            return Quantised(actions, codes, self.beta * kl, none, none, kl)

    def metrics(self, quantised: Quantised) -> dict[str, Tensor]:
        """``kl``: the divergence in nats per element."""
        return {"kl": quantised.regulariser.detach()}

    def features(self, quantised: Quantised) -> Tensor:
        """The actions themselves, fp32 ``[B*M, N*D]``: the means, if ``quantised`` was made without noise."""
        return quantised.actions.flatten(0, 1).flatten(1)
