"""What latent actions are worth: control, transfer from scene to scene, leakage at cuts, what each code does, what it tells of true actions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.evaluation import probe, video
from cola_dist.evaluation.known import known_rows
from cola_dist.evaluation.probe import ProbeScore
from cola_dist.evaluation.rollout import generate
from cola_dist.methods.base import Clips
from cola_dist.methods.cotrain import CoTrain
from cola_dist.methods.draws import Draws
from cola_dist.models.autoencoder import to_pixels

ATLAS_CODES = 64
"""Codes that an atlas shows at most."""


@dataclass(frozen=True)
class Scenes:
    """Clips A and, for each, another clip B, uint8 ``[B, T, 3, H, W]`` as are the rollouts; all start from the context of the clip they continue.

    The noise of a rollout in A's scene is always A's own, so only actions differ.
    """

    truth: Tensor
    """A."""
    own: Tensor
    """A continued with its own actions."""
    other: Tensor
    """A continued with B's actions."""
    scene: Tensor
    """B."""
    transfer: Tensor
    """B continued with A's actions: the action-transfer video."""
    returned: Tensor
    """A continued with the actions that are inferred from ``transfer``: the cycle A -> B -> A."""


@torch.no_grad()
def play(method: CoTrain, a: Clips, b: Clips, context: int) -> Scenes:
    """Rollouts of clips ``a`` and their partners ``b`` after ``context`` video frames."""
    actions, foreign = (infer(method, clips.video) for clips in (a, b))
    starts = [method.latents(clips)[:, : latent_frames(method, context)] for clips in (a, b)]
    noises = [_noise(method, clips, "rollout", clips.video.shape[1]) for clips in (a, b)]
    transfer = generate(method, starts[1], actions, noises[1])
    return Scenes(
        truth=a.video,
        own=generate(method, starts[0], actions, noises[0]),
        other=generate(method, starts[0], foreign, noises[0]),
        scene=b.video,
        transfer=transfer,
        returned=generate(method, starts[0], infer(method, transfer), noises[0]),
    )


def action_figures(scenes: Scenes, context: int) -> dict[str, Tensor]:
    """fp64 ``[B]`` each, after ``context`` video frames.

    ``other_psnr`` and ``delta_psnr``: PSNR in dB with another clip's actions, and by how much it is below that with the clip's own
    (controllability; Genie, 2402.15391). ``cycle_error``: mean absolute difference (share of the range) between the rollout after the cycle and
    the direct one; ``shuffled_error``: the same of a rollout with another clip's actions, which a cycle that carries nothing would have;
    ``cycle_margin``: by how much the cycle is below it. Where the generator ignores actions all three are 0, and the cycle has shown nothing.
    """
    own, other = (video.psnr(rollout, scenes.truth, context) for rollout in (scenes.own, scenes.other))
    cycle, shuffled = (video.absolute_error(rollout, scenes.own, context) for rollout in (scenes.returned, scenes.other))
    return {
        "other_psnr": other,
        "delta_psnr": own - other,
        "cycle_error": cycle,
        "shuffled_error": shuffled,
        "cycle_margin": shuffled - cycle,
    }


@torch.no_grad()
def leakage_figures(method: CoTrain, a: Clips, b: Clips) -> dict[str, Tensor]:
    """Whether the action at a scene cut lets the generator paint the next scene: dB, fp64 ``[B]`` each.

    Clips are cut off after the frames of one latent frame, which is generated after all before it. ``cut_gain``: PSNR of those frames with the
    inferred action less their PSNR with the null action, in A's first half spliced to B's frames that follow in time; ``ordinary_gain``: the same
    in A itself. ``leakage`` is the first less the second. An action says what moves; one that knows the next scene has a cut_gain far above.
    """
    stride = method.autoencoder.shape.stride
    given = latent_frames(method, a.video.shape[1]) // 2
    cut = 1 + (given - 1) * stride
    end = cut + stride
    context = method.autoencoder.encode(a.video[:, :cut])
    noise = _noise(method, a, "cut", end)
    gains = {}
    for name, following in (("cut_gain", b.video), ("ordinary_gain", a.video)):
        clip = torch.cat([a.video[:, :cut], following[:, cut:end]], 1)
        own = infer(method, clip)
        null = own.clone()
        null[:, cut - 1 :] = method.conditioning.null_actions(len(own), stride)
        with_own, with_null = (video.psnr(generate(method, context, actions, noise), clip, cut) for actions in (own, null))
        gains[name] = with_own - with_null
    return gains | {"leakage": gains["cut_gain"] - gains["ordinary_gain"]}


@torch.no_grad()
def atlas(method: CoTrain, clip: Clips, context: int) -> Tensor | None:
    """What each code does in one scene: rollouts uint8 ``[K, T, 3, H, W]`` of the one ``clip``, all with its noise, in which every token of every
    transition is that code; at most `ATLAS_CODES` of them. None where the bottleneck has no codes.
    """
    codes = min(method.lam.bottleneck.codes, ATLAS_CODES)
    if not codes:
        return None
    start = method.latents(clip)[:, : latent_frames(method, context)]
    noise = _noise(method, clip, "rollout", clip.video.shape[1])
    shape = (1, clip.video.shape[1] - 1, method.config.lam.tokens)
    device = clip.video.device
    rows = [generate(method, start, method.lam.bottleneck.actions_of(torch.full(shape, k, device=device)), noise) for k in range(codes)]
    return torch.cat(rows)


def probe_source(method: CoTrain, config: RunConfig, source: str, clips: int, device: torch.device) -> Mapping[str, ProbeScore] | None:
    """How a ridge map reads the true actions of ``source`` from ``codes``, and its controls: ``random_idm``, ``frame_difference``, ``permuted``.

    Fitted on ``clips`` clips of the training split, scored on as many held-out ones. None where a split has no actions or the training split
    fewer than two episodes with them.
    """
    rows = known_rows(config.data, config.train.seed, clips, device, source)
    if rows is None or len(rows.episode[~rows.heldout].unique()) < 2:
        return None
    features = {
        "codes": probe.code_features(method.lam, rows.video),
        "random_idm": probe.code_features(probe.untrained_lam(config, rows.video), rows.video),
        "frame_difference": probe.difference_features(rows.video),
    }
    features = {name: values.cpu() for name, values in features.items()}
    return probe.probe_with_controls(features, rows.actions, rows.episode, rows.heldout, config.train.seed)


def infer(method: CoTrain, frames: Tensor) -> Tensor:
    """Latent actions ``[B, T-1, N, D]`` of uint8 ``[B, T, 3, H, W]``."""
    actions: Tensor = method.lam.infer(to_pixels(frames))[1].actions
    return actions


def latent_frames(method: CoTrain, frames: int) -> int:
    """Latent frames of so many video frames."""
    return 1 + (frames - 1) // method.autoencoder.shape.stride


def _noise(method: CoTrain, clips: Clips, purpose: str, frames: int) -> Tensor:
    """``[B, L, C, h, w]`` for ``frames`` video frames, keyed by the clips' positions."""
    shape = method.autoencoder.shape
    side = [size // shape.shrinks for size in clips.video.shape[-2:]]
    draws = Draws(method.config.train.seed, clips.position, clips.video.device)
    return draws.normal(purpose, latent_frames(method, frames), shape.channels, *side)
