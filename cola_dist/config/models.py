"""What the models are: sizes, kinds, where their weights come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class BottleneckConfig:
    """The bottleneck of latent actions (paper: vq, one codebook shared by all slots, straight-through, fp32, no EMA, no reset)."""

    kind: Literal["vq", "cosine", "simvq", "rotation", "fsq", "continuous"] = "vq"
    """vq: nearest trained code (paper). cosine: the same on the unit sphere (2110.04627). simvq: fixed random codes through a trained linear map
    (2411.02038). rotation: vq with the rotation trick's gradient (2410.06424). fsq: a grid of rounded scalars (2309.15505). continuous: a
    beta-VAE's latents, without codes (AdaWorld)."""
    codes: int = 32
    """K, entries of the codebook, shared by all slots; with fsq a product of levels, see `fsq_levels`."""
    dim: int = 32
    """D, dimensions of one token."""
    init: Literal["uniform", "normal", "data"] = "uniform"
    """vq, cosine, rotation: codebook start, U(-1/K, 1/K), N(0, 1), or entries drawn from the first batch's z (open)."""
    codebook_weight: float = 1.0
    """Kinds with a codebook: weight of ||sg[z] - e||^2."""
    commitment_weight: float = 0.25
    """Kinds with a codebook: weight of ||z - sg[e]||^2."""
    entropy_weight: float = 0.0
    """Kinds with a codebook: weight of E[H(p(c|z))] - H(E[p(c|z)]), which asks for sure tokens and for all codes (2310.05737)."""
    reset_every: int = 0
    """vq, cosine, rotation: every so many steps, move codes unused since the last time onto z of the batch; 0 = never (the faithful baseline)."""
    beta: float = 2e-4
    """continuous: weight of the divergence from N(0, 1), a mean over elements (AdaWorld's value; its code sums over the dimensions)."""


def fsq_levels(codes: int) -> tuple[int, ...]:
    """How many values each scalar of a grid of ``codes`` points takes, largest first: the fewest factors from 3 to 8, and of those the most even.

    32 -> (8, 4), 240 -> (8, 6, 5), 1000 -> (8, 5, 5, 5). Empty where there is no such product.
    """

    def factorings(rest: int, largest: int) -> Iterator[tuple[int, ...]]:
        if rest == 1:
            yield ()
        for level in range(largest, 2, -1):
            if rest % level == 0:
                yield from ((level, *others) for others in factorings(rest // level, level))

    return min(factorings(codes, 8), key=lambda levels: (len(levels), -min(levels, default=0)), default=())


@dataclass(frozen=True)
class LamConfig:
    """The inverse dynamics model: an ST-transformer over pixels, pooled to N tokens per transition."""

    resolution: int = 0
    """Side in pixels to which the inverse dynamics' frames are resized (paper: 224, of 256); 0 = as they are."""
    patch: int = 8
    width: int = 64
    depth: int = 3
    heads: int = 4
    pool: Literal["pair", "difference"] = "pair"
    """What is pooled into a transition's tokens: the patches of both frames (paper), or the difference of their features (open), in which all that
    stays the same cancels."""
    tokens: int = 2
    """N, tokens per transition."""
    input: Literal["frames", "frames+change", "change"] = "frames"
    """What the patch embedding sees: each frame (paper), its change from the frame before as well, or the change alone (open)."""
    forward_depth: int = 2
    """Blocks of the LAM's own forward model, which is there only where something trains on it (paper, two-stage baseline: 12)."""
    bottleneck: BottleneckConfig = field(default_factory=BottleneckConfig)


@dataclass(frozen=True)
class ConditioningConfig:
    """From latent actions to shift / scale / gate of every block, per frame."""

    depth: int = 2
    """Self-attention blocks over the latent-action sequence (paper: 6)."""
    width: int = 64
    heads: int = 4
    dropout: float = 0.1
    """Probability that one transition's action becomes the null action, for classifier-free guidance (paper)."""


@dataclass(frozen=True)
class LatentShape:
    """How an autoencoder's latents lie to the video."""

    channels: int
    stride: int
    """r, video frames per latent frame; ``L = 1 + (T-1) / r``."""
    shrinks: int
    """Pixels of a side per place of a latent frame."""
    most_frames: int = 0
    """Longest clip; 0 = any."""
    tiles: bool = False
    """Whether frames may pass in tiles."""


AUTOENCODERS: Mapping[str, LatentShape] = {
    "pixels": LatentShape(3, 1, 1),
    "opensora": LatentShape(4, 4, 8, most_frames=17, tiles=True),
    "wan": LatentShape(16, 4, 8, tiles=True),
    "svd": LatentShape(4, 1, 8),
}


@dataclass(frozen=True)
class AutoencoderConfig:
    """From video to the latents that the generator models. Always frozen."""

    kind: Literal["pixels", "opensora", "wan", "svd"] = "pixels"
    """pixels: the video itself, scaled to [-1, 1]. opensora: Open-Sora v1.2's, 17 frames to 5 latent frames of an eighth of the sides. wan: Wan
    2.1's and Cosmos-Predict2's, 1 + 4n frames to 1 + n. svd: Stable Video Diffusion's, a latent frame per frame."""
    pretrained: str | None = None
    """All but pixels: folder in the published layout (path or ``s3://…``)."""
    images_at_once: int = 16
    """opensora, svd: frames that pass together; wan: clips. Fewer take less memory and give the same. (svd decodes a clip at a time, whatever its
    length: its decoder looks at neighbouring frames.)"""
    tile: int = 0
    """opensora, wan: side in pixels, a multiple of 32, of the squares that larger frames are cut into, so that memory does not grow with the frame;
    0 = whole frames. Neighbours share a quarter of a side, over which one fades into the other. That is near to the whole frame's result, not equal
    to it: at its edges and in attention, and for opensora in norms as well, a tile knows nothing of the rest. So a run keeps its tile."""


@dataclass(frozen=True)
class WorldConfig:
    """The video generator. With ``pretrained`` set, the shape fields must agree with the checkpoint's."""

    kind: Literal["space_time_dit", "stdit3", "wan", "cosmos", "svd"] = "space_time_dit"
    """space_time_dit: written for this project, from 0.3 M parameters on. stdit3: Open-Sora v1.2's, without text and causal in time. wan: Wan
    2.1's, text to video. cosmos: Cosmos-Predict2 2B's, video to world, without text; its autoencoder is Wan's.
    svd: Stable Video Diffusion's UNet (patch 8; width and heads are those of its outermost level)."""
    pretrained: str | None = None
    """Folder with ``config.json`` and ``model.safetensors``, of this project or as published (path, ``s3://…`` or ``embedded:NAME``); none =
    random weights."""
    fps: int = 5
    """stdit3, cosmos, svd: frames per second of the clips, as the generator is told them."""
    mlp_width: int = 8960
    """wan: width of the MLP's middle."""
    text_width: int = 4096
    """wan: features of a prompt's embedding. The prompt is always empty; 0 removes cross-attention."""
    null_prompt: str | None = None
    """wan: file of safetensors (path or ``s3://…``) with one tensor ``[n, text_width]``, the text encoder's embedding of the empty prompt (umT5's,
    512 rows); it becomes part of the weights. none = zeros, which differ from it in the end token's row alone and cost less: by count, 512 rows add
    about 5 % to a step of Wan2.1-T2V-1.3B, which the plan of ``--dry-run`` leaves out."""
    patch: int = 8
    width: int = 64
    depth: int = 4
    heads: int = 4


@dataclass(frozen=True)
class FlowConfig:
    """Rectified flow: how noise levels and context are drawn, and how rollouts are sampled."""

    tau_min: float = 0.0
    """Lowest flow time of generated frames (1 = pure noise)."""
    tau_shift: float = 3.0
    """Bias of tau towards noise: tau <- s * u / (1 + (s - 1) * u), u uniform."""
    context_max: int = 0
    """Clean context frames are drawn from 1 … context_max; 0 = up to L - 1 (open)."""
    sampler_steps: int = 10
    """Euler steps per rollout (paper: 10)."""
    guidance: float = 1.0
    """Classifier-free guidance on the action; 1 = none (paper: 4.0)."""
