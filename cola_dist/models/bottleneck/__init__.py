"""The bottleneck of the latent action model. `build_bottleneck` makes the kind that a configuration names."""

from __future__ import annotations

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.base import Bottleneck, Quantised
from cola_dist.models.bottleneck.continuous import ContinuousLatents
from cola_dist.models.bottleneck.cosine import CosineQuantiser
from cola_dist.models.bottleneck.fsq import FiniteScalarQuantiser
from cola_dist.models.bottleneck.rotation import RotationQuantiser
from cola_dist.models.bottleneck.simvq import SimVQ
from cola_dist.models.bottleneck.vq import VectorQuantiser

__all__ = ["Bottleneck", "Quantised", "build_bottleneck"]


def build_bottleneck(config: BottleneckConfig, seed: int) -> Bottleneck:
    """The bottleneck of ``config.kind``. Weights are drawn from torch's global generator, codes placed on z by ``seed``."""
    match config.kind:
        case "vq":
            return VectorQuantiser(config, seed)
        case "cosine":
            return CosineQuantiser(config, seed)
        case "rotation":
            return RotationQuantiser(config, seed)
        case "simvq":
            return SimVQ(config, seed)
        case "fsq":
            return FiniteScalarQuantiser(config)
        case "continuous":
            return ContinuousLatents(config)
