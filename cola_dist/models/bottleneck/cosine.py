"""Codes and z on the unit sphere (ViT-VQGAN, Yu et al. 2022, arXiv 2110.04627, section 3.2)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from cola_dist.models.bottleneck.vq import VectorQuantiser


class CosineQuantiser(VectorQuantiser):
    """Nearest code by cosine similarity: both sides are divided by their norms before they are compared.

    The generator and the losses see unit vectors too, of z as of codes: an element is about 1/sqrt(D) in size whatever the scale of z, and what
    the norm of z says is lost. Weights start on the unit sphere, so that a learning rate turns codes of any ``init`` equally far.
    """

    @property
    def codebook(self) -> Tensor:
        """fp32 ``[K, D]``, of norm 1."""
        return self._comparable(super().codebook)

    def _comparable(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1)
