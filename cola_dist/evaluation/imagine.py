"""Rollouts of any length: window by window, each as long as the clips that the generator was trained on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cola_dist.config import AUTOENCODERS, FlowConfig, RunConfig
from cola_dist.methods.cotrain import CoTrain
from cola_dist.methods.draws import Draws
from cola_dist.models.flow import sample
from cola_dist.models.layers import Past

Noise = Callable[[int, int], Tensor]
"""Where the flow of the latent frames ``first ... last - 1`` of a rollout starts: ``[B, last - first, C, h, w]``."""


@dataclass(frozen=True)
class Sampling:
    """How rollouts are made."""

    window: int
    """Latent frames that the generator sees at once."""
    context: int
    """How many of them are clean, from the second window on: the last ones of the window before."""
    flow: FlowConfig
    """Sampler's steps and guidance g; with g other than 1: v = v_null + g (v_actions - v_null)."""
    cached: bool = True
    """Pass the clean frames of a window once instead of in every step of the sampler, where the generator's frames see no later ones."""


@dataclass(frozen=True)
class Piece:
    """What one window adds to a rollout; the first piece begins with the given context."""

    latents: Tensor
    """fp32 ``[B, k, C, h, w]``."""
    frames: Tensor
    """uint8 ``[B, k', 3, H, W]``: k' = k, times the autoencoder's temporal stride but for the rollout's first frame."""


def sampling_of(config: RunConfig, steps: int = 0, context: int = 0) -> Sampling:
    """Windows of the length that ``config`` trained on. 0 for ``steps``: as configured; for ``context``: half a window.

    Raises `ValueError` for a context that leaves nothing of a window to be generated.
    """
    window = 1 + (config.data.frames - 1) // AUTOENCODERS[config.autoencoder.kind].stride
    longest = min(config.flow.context_max or window - 1, window - 1)
    context = context or max(1, min(window // 2, longest))
    if context >= window:
        raise ValueError(f"{context} frames of context fill the window of {window}")
    return Sampling(window, context, replace(config.flow, sampler_steps=steps or config.flow.sampler_steps))


def keyed_noise(seed: int, key: Tensor, shape: tuple[int, ...], device: torch.device) -> Noise:
    """Noise of frames of ``shape`` (C, h, w), each drawn from (seed, the clip's entry of ``key``, int64 ``[B]``, number of the frame)."""
    draws = Draws(seed, key, device)
    return lambda first, last: torch.stack([draws.normal(f"rollout/{frame}", *shape) for frame in range(first, last)], 1)


@torch.no_grad()
def imagine(method: CoTrain, context: Tensor, actions: Tensor, noise: Noise, sampling: Sampling) -> Iterator[Piece]:
    """Continue the latent frames ``context [B, c, C, h, w]`` under ``actions [B, T-1, N, D]``; each window is given away as it is done.

    L = 1 + (T-1) / r latent frames in all, more than c; c is less than a window. Each window is what a clip was in training: its first frame has no
    action that leads into it, and where r is not 1 its context is encoded anew from the frames, for a clip's first latent frame stands for one
    frame and later ones for r. With a causal generator a longer rollout does not change its beginning, and a clip's rollout does not depend on the
    clips beside it (but for rounding). Raises `ValueError` for lengths that do not fit.
    """
    stride = method.autoencoder.shape.stride
    total, known = 1 + actions.shape[1] // stride, context.shape[1]
    if actions.shape[1] % stride or not 0 < known < min(total, sampling.window) or not 0 < sampling.context < sampling.window:
        raise ValueError(
            f"{known} and later {sampling.context} of {sampling.window} frames as context, {actions.shape[1]} actions of {stride}"
        )
    start, given = 0, context
    while known < total:
        end = min(total, start + sampling.window)
        latents = _window(method, given, actions[:, start * stride : (end - 1) * stride], noise(known, end), sampling)
        frames = method.autoencoder.decode(latents)
        seen = known - start if start else 0
        yield Piece(latents[:, seen:], frames[:, 1 + (seen - 1) * stride if seen else 0 :])
        start, known = end - sampling.context, end
        if known < total:
            last = frames[:, -(1 + (sampling.context - 1) * stride) :]
            given = latents[:, -sampling.context :] if stride == 1 else method.autoencoder.encode(last)


def _window(method: CoTrain, given: Tensor, actions: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """``given [B, c, C, h, w]`` and the frames after it, which start as ``noise [B, k, C, h, w]``: fp32 ``[B, c + k, C, h, w]``."""
    with torch.autocast(given.device.type, torch.bfloat16, enabled=method.bf16):
        modulations = [method.conditioning(actions)]
        if sampling.flow.guidance != 1.0:
            null = method.conditioning.null_actions(*actions.shape[:2]).to(actions.dtype)
            modulations.append(method.conditioning(null))
        pasts: list[list[Past] | None] = [method.world.new_past() if sampling.cached else None for _ in modulations]
        passed = 0
        for past, modulation in zip(pasts, modulations, strict=True):
            if past is not None:
                passed = given.shape[1]
                method.world(given, torch.zeros(given.shape[:2], device=given.device), modulation[:, :passed], past)

        def velocity(x: Tensor, tau: Tensor) -> Tensor:
            found = [method.world(x, tau, rows[:, passed:], past) for rows, past in zip(modulations, pasts, strict=True)]
            own: Tensor = found[0]
            return own if len(found) == 1 else found[1] + sampling.flow.guidance * (own - found[1])

        if passed:
            return torch.cat([given, sample(velocity, given[:, :0], noise, sampling.flow)], 1)
        return sample(velocity, given, torch.cat([given, noise], 1), sampling.flow)
