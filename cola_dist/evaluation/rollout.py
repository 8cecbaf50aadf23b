"""Rollouts of the generator under latent actions, as video to look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cola_dist.evaluation.imagine import Sampling, imagine
from cola_dist.methods.base import Clips
from cola_dist.methods.cotrain import CoTrain, other_clip
from cola_dist.methods.draws import Draws


@dataclass(frozen=True)
class Rollouts:
    """uint8 ``[B, T, 3, H, W]`` each; the first frame of all is the clip's own."""

    truth: Tensor
    own: Tensor
    """Generated with the clip's own actions: inferred from it, or an adaptation's real ones."""
    other: Tensor
    """Generated from the same frame and noise with another clip's actions."""


def generate(method: CoTrain, context: Tensor, actions: Tensor, noise: Tensor) -> Tensor:
    """Continue the latent frames ``context [B, c, C, h, w]`` under ``actions [B, T-1, N, D]``, all frames at once: uint8 ``[B, T, 3, H, W]``.

    ``noise [B, L, C, h, w]`` is where the flow starts. `imagine` goes on where a clip's length ends.
    """
    at_once = Sampling(noise.shape[1], context.shape[1], method.config.flow, cached=False)
    (piece,) = imagine(method, context, actions, lambda first, last: noise[:, first:last], at_once)
    return piece.frames


@torch.no_grad()
def rollouts(method: CoTrain, clips: Clips) -> Rollouts:
    """Rollouts of all ``clips`` (at least two) from their first frame, an adaptation's with their real actions; the noise is keyed by position, so
    pictures of two steps compare."""
    _, quantised = method.latent_actions(clips)
    latents = method.latents(clips)
    noise = Draws(method.config.train.seed, clips.position, clips.video.device).normal("rollout", *latents.shape[1:])
    own = generate(method, latents[:, :1], quantised.actions, noise)
    other = generate(method, latents[:, :1], quantised.actions[other_clip(clips.source)], noise)
    return Rollouts(clips.video, own, other)


def psnr(frames: Tensor, truth: Tensor) -> Tensor:
    """PSNR of each clip in dB, ``[B]``, of uint8 ``[B, T, 3, H, W]`` against the truth, the first frame (the context) left out."""
    error = (frames[:, 1:].float() - truth[:, 1:].float()).square().mean((1, 2, 3, 4))
    return 10 * torch.log10(255.0**2 / error.clamp(min=1e-8))


def rollout_figures(result: Rollouts) -> dict[str, float]:
    """``rollout_psnr`` with own actions and ``delta_psnr``, by how much it falls with another clip's (controllability; Genie, 2402.15391), in dB."""
    own, other = psnr(result.own, result.truth), psnr(result.other, result.truth)
    return {"rollout_psnr": float(own.mean()), "delta_psnr": float((own - other).mean())}
