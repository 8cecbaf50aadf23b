"""Rectified flow (Liu et al. 2022; Lipman et al. 2022): noise, target velocity, loss, and the Euler sampler.

tau = 0 is data and tau = 1 is noise; the velocity has the sign of ``diffusers`` (noise minus data).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from cola_dist.config import FlowConfig


def flow_time(u: Tensor, config: FlowConfig) -> Tensor:
    """Flow time of ``u`` in [0, 1): pushed towards noise by ``tau_shift``, then squeezed into ``[tau_min, 1]``."""
    shifted = config.tau_shift * u / (1 + (config.tau_shift - 1) * u)
    return config.tau_min + (1 - config.tau_min) * shifted


def frame_times(tau: Tensor, context: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Flow time of each frame ``[B, L]`` and the mask ``[B, L]`` of generated frames.

    ``tau [B]`` holds for the frames after the first ``context [B]`` ones; those are clean: tau = 0.
    """
    generated = torch.arange(frames, device=tau.device) >= context[:, None]
    return torch.where(generated, tau[:, None], 0.0), generated


def noised(x0: Tensor, eps: Tensor, tau: Tensor) -> Tensor:
    """x_tau = (1 - tau) x0 + tau eps, for ``x0, eps [B, L, C, h, w]`` and ``tau [B, L]``."""
    weight = tau[:, :, None, None, None]
    return (1 - weight) * x0 + weight * eps


def still_velocity(x_tau: Tensor, x0: Tensor, tau: Tensor) -> Tensor:
    """The velocity ``[B, L, C, h, w]`` of a predictor that knows no motion: from ``x_tau`` to the first frame, at every frame.

    What a generator after one context frame has to beat. Its flow loss is that of ``(x0 - first) / tau``.
    """
    return (x_tau - x0[:, :1]) / tau.clamp(min=1e-6)[:, :, None, None, None]


def flow_loss(velocity: Tensor, x0: Tensor, eps: Tensor, generated: Tensor, weight: Tensor | None = None) -> Tensor:
    """||v - (eps - x0)||^2 of each clip ``[B]``, fp32: mean over the elements of its generated frames.

    ``generated [B, L]`` marks them, at least one a clip. Clips weigh the same however many of their frames are context, so the mean
    over equal shards is the mean over the batch. ``weight``, which broadcasts to ``x0``, weighs the squared errors.
    """
    squares = (velocity.float() - (eps - x0).float()).square()
    per_frame = (squares if weight is None else squares * weight).mean((2, 3, 4))
    return (per_frame * generated).sum(1) / generated.sum(1)


def sample(velocity: Callable[[Tensor, Tensor], Tensor], context: Tensor, noise: Tensor, config: FlowConfig) -> Tensor:
    """Euler steps from ``noise [B, L, C, h, w]`` to latents of the same shape whose first frames are ``context [B, c, C, h, w]``.

    ``velocity(x, tau [B, L])`` is asked ``config.sampler_steps`` times, at the flow times that training favours (`flow_time`).
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    given = context.shape[1]
    steps = config.sampler_steps
    sigmas = flow_time(torch.linspace(1.0, 1.0 / steps, steps), config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=sigmas.tolist(), device=noise.device)
    x = noise.clone()
    lengths = torch.full((len(x),), given, device=x.device)
    for sigma, timestep in zip(scheduler.sigmas[:-1], scheduler.timesteps, strict=True):
        x[:, :given] = context
        tau, _ = frame_times(sigma.to(x.device).expand(len(x)), lengths, x.shape[1])
        x = scheduler.step(velocity(x, tau).float(), timestep, x, return_dict=False)[0]
    x[:, :given] = context
    return x
