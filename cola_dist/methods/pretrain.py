"""Training a generator on video alone, without actions."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.methods.base import Clips, Method, StepOutput
from cola_dist.methods.draws import Draws
from cola_dist.models.autoencoder import Autoencoder
from cola_dist.models.flow import flow_loss, frame_times, noised, still_velocity
from cola_dist.models.world import WorldModel

TAU_BINS = 4
"""Flow times at which held-out loss and sensitivity are measured: the middles of this many equal parts of ``[tau_min, 1]``."""


def bin_times(tau_min: float, bins: Tensor) -> Tensor:
    """Flow time of the middle of each bin."""
    return tau_min + (1 - tau_min) * (bins + 0.5) / TAU_BINS


class Pretrain(Method):
    """Role "world" only; the loss is the flow loss of the unconditioned generator."""

    def __init__(self, config: RunConfig, bf16: bool, autoencoder: Autoencoder, world: WorldModel) -> None:
        super().__init__(bf16, autoencoder)
        self.config = config
        self.world = world

    def roles(self) -> tuple[str, ...]:
        return ("world",)

    def forward(self, clips: Clips, step: int) -> StepOutput:
        device = clips.video.device
        draws = Draws(self.config.train.seed, clips.position, device)
        with self._autocast(device):
            x0 = self.latents(clips)
            eps = draws.normal("noise", *x0.shape[1:])
            tau, generated = frame_times(draws.flow_time(self.config.flow), draws.context(self.config.flow, x0.shape[1]), x0.shape[1])
            loss = flow_loss(self.world(noised(x0, eps, tau), tau, None), x0, eps, generated).mean()
        return StepOutput(loss, {"loss": loss.detach(), "flow_loss": loss.detach()}, None)

    @torch.no_grad()
    def evaluate(self, clips: Clips) -> dict[str, Tensor]:
        """``flow_count``, ``flow_own`` and ``flow_copy``, of a repeated context frame, per bin of tau, float64 ``[TAU_BINS]``: every clip at
        every bin, one context frame."""
        device = clips.video.device
        x0 = self.latents(clips)
        eps = Draws(self.config.train.seed, clips.position, device).normal("noise", *x0.shape[1:])
        ones = torch.ones(len(x0), dtype=torch.int64, device=device)
        own, copy = torch.zeros(2, TAU_BINS, dtype=torch.float64, device=device)
        with self._autocast(device):
            for index in range(TAU_BINS):
                times = bin_times(self.config.flow.tau_min, torch.full_like(ones, index))
                tau, generated = frame_times(times, ones, x0.shape[1])
                x_tau = noised(x0, eps, tau)
                own[index] = flow_loss(self.world(x_tau, tau, None), x0, eps, generated).double().sum()
                copy[index] = flow_loss(still_velocity(x_tau, x0, tau), x0, eps, generated).double().sum()
        return {"flow_count": torch.full_like(own, len(x0)), "flow_own": own, "flow_copy": copy}
