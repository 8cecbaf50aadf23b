"""How near generated video is to the truth: PSNR and SSIM always, LPIPS and FVD where their networks are given.

PSNR and SSIM are of uint8 frames as [0, 1], per frame after the context, then the mean over the frames of a clip.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from cola_dist.evaluation.networks import MetricNetwork
from cola_dist.models.autoencoder import to_pixels

BEST_PSNR = 100.0
"""What a frame without any error counts, in dB: infinity has no mean."""
FVD_SIDE = 224
"""Side in pixels of the frames that FVD's network sees."""


def psnr(frames: Tensor, truth: Tensor, context: int) -> Tensor:
    """PSNR of each clip in dB, fp64 ``[B]``, of uint8 ``[B, T, 3, H, W]``; the first ``context`` frames do not count."""
    pairs = _unit_frames(frames, context), _unit_frames(truth, context)
    values = peak_signal_noise_ratio(*pairs, data_range=1.0, reduction="none", dim=(1, 2, 3))
    return _per_clip(values.clamp(max=BEST_PSNR), len(frames))


def ssim(frames: Tensor, truth: Tensor, context: int) -> Tensor:
    """SSIM of each clip, fp64 ``[B]`` (Wang et al. 2004); arguments as in `psnr`.

    Gaussian window of 11 pixels, sigma 1.5, over the whole picture, which is reflected at its edges; mean over channels.
    """
    pairs = _unit_frames(frames, context), _unit_frames(truth, context)
    values = structural_similarity_index_measure(*pairs, data_range=1.0, reduction="none")
    assert isinstance(values, Tensor)
    return _per_clip(values, len(frames))


def absolute_error(frames: Tensor, truth: Tensor, context: int) -> Tensor:
    """Mean absolute difference of each clip as a share of the range of values, fp64 ``[B]``; see `psnr`."""
    difference = _unit_frames(frames, context) - _unit_frames(truth, context)
    return _per_clip(difference.abs().mean((1, 2, 3)), len(frames))


def lpips(network: MetricNetwork, frames: Tensor, truth: Tensor, context: int) -> Tensor:
    """LPIPS of each clip, fp64 ``[B]``, the mean over its frames (Zhang et al. 2018); arguments as in `psnr`."""
    pairs = (to_pixels(frames[:, context:]).flatten(0, 1), to_pixels(truth[:, context:]).flatten(0, 1))
    values = network(*pairs).double().flatten()
    network.check(values, (len(pairs[0]),))
    return _per_clip(values, len(frames))


def fvd_features(network: MetricNetwork, video: Tensor) -> Tensor:
    """What FVD compares (Unterthiner et al. 2018), fp64 ``[B, 400]``, of whole clips uint8 ``[B, T, 3, H, W]``, context included."""
    pixels = to_pixels(video).flatten(0, 1)
    pixels = F.interpolate(pixels, (FVD_SIDE, FVD_SIDE), mode="bilinear", align_corners=False).unflatten(0, video.shape[:2])
    features = network(pixels.transpose(1, 2).contiguous(), rescale=False, resize=False, return_features=True).double()
    network.check(features, (len(video), 400))
    return features


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Distance of the normal distributions that fit ``a [n, F]`` and ``b [m, F]``, n, m >= 2, in fp64 (Dowson and Landau 1982).

    ``|mean_a - mean_b|^2 + tr(C_a) + tr(C_b) - 2 tr((C_a C_b)^(1/2))``, covariances over n - 1. With ``C = X^T X`` the last trace is the sum of
    the singular values of ``X_a X_b^T``: no root of a covariance is taken, which fewer clips than features would make singular.
    Raises `ValueError` with fewer than two rows.
    """
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a Fréchet distance needs two rows on each side, not {len(a)} and {len(b)}")
    a, b = a.double(), b.double()
    factors = [(rows - rows.mean(0)) / (len(rows) - 1) ** 0.5 for rows in (a, b)]
    # QR leaves X^T X as it is and at most F rows of X, however many clips there are.
    small = [torch.linalg.qr(rows, mode="r").R for rows in factors]
    cross = torch.linalg.svdvals(small[0] @ small[1].T).sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + sum(rows.square().sum() for rows in factors) - 2 * cross
    # Equal sets leave rounding on either side of 0.
    return max(0.0, float(distance))


def _unit_frames(video: Tensor, context: int) -> Tensor:
    """uint8 ``[B, T, 3, H, W]`` as fp64 frames in [0, 1] after the context, ``[B * (T - context), 3, H, W]``."""
    return video[:, context:].flatten(0, 1).double() / 255


def _per_clip(values: Tensor, clips: int) -> Tensor:
    """The mean over frames of ``values [clips * frames]``, ``[clips]``."""
    means: Tensor = values.view(clips, -1).mean(1)
    return means
