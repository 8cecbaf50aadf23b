"""Rollouts of the generator under a robot's real actions, beside those under the LAM's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cola_dist.evaluation.rollout import generate, psnr
from cola_dist.methods.adapt import Adapt
from cola_dist.methods.base import Clips
from cola_dist.methods.cotrain import other_clip
from cola_dist.methods.draws import Draws
from cola_dist.models.autoencoder import to_pixels


@torch.no_grad()
def psnr_sums(method: Adapt, clips: Clips) -> dict[str, Tensor]:
    """Sums over clips, float64, of the PSNR in dB of rollouts from the first frame, by what drives them, and their ``count``.

    ``own``, ``other``: the clip's and another clip's real actions; ``null``: the null action; ``lam``, ``lam_other``: what the LAM infers from the
    clip and from another one, the reference that an adapter may come up to. A batch of one clip adds nothing.
    """
    names = ("own", "other", "null", "lam", "lam_other")
    sums = {name: torch.zeros((), dtype=torch.float64, device=clips.video.device) for name in (*names, "count")}
    if len(clips) < 2:
        return sums
    _, given = method.latent_actions(clips)
    _, inferred = method.lam.infer(to_pixels(clips.video))
    other = other_clip(clips.source)
    null = method.conditioning.null_actions(*given.actions.shape[:2]).to(given.actions.dtype)
    actions = (given.actions, given.actions[other], null, inferred.actions, inferred.actions[other])
    latents = method.latents(clips)
    noise = Draws(method.config.train.seed, clips.position, clips.video.device).normal("rollout", *latents.shape[1:])
    for name, one in zip(names, actions, strict=True):
        sums[name] = psnr(generate(method, latents[:, :1], one, noise), clips.video).double().sum()
    return sums | {"count": sums["count"] + len(clips)}


def figures(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Of `psnr_sums`, in dB: ``rollout_psnr`` with the own real actions and ``rollout_psnr_other``, ``…_null``, ``…_lam``; ``delta_psnr``, by how
    much it falls with another clip's real actions, ``delta_psnr_null``, and ``delta_psnr_lam``, the same of the LAM's.

    Empty where nothing was rolled out.
    """
    if not sums["count"]:
        return {}
    mean = {name: float(value / sums["count"]) for name, value in sums.items()}
    return {
        "rollout_psnr": mean["own"],
        "rollout_psnr_other": mean["other"],
        "rollout_psnr_null": mean["null"],
        "rollout_psnr_lam": mean["lam"],
        "delta_psnr": mean["own"] - mean["other"],
        "delta_psnr_null": mean["own"] - mean["null"],
        "delta_psnr_lam": mean["lam"] - mean["lam_other"],
    }
