"""The rotation trick (Fifty et al. 2024, arXiv 2410.06424): where in its cell z lies reaches the gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_dist.models.bottleneck.vq import VectorQuantiser

_EPS = 1e-6


def rotated(z: Tensor, code: Tensor) -> Tensor:
    """Values of ``code [..., D]``; the gradient to ``z [..., D]`` is turned by the rotation from the code to z and scaled by |code| / |z|.

    Section 4: with unit vectors u of z and q of the code and r = (u + q) / |u + q|, code = (|code| / |z|) R z with
    R = I - 2 r r^T + 2 q u^T, where the factor and R count as constants. So the angle between gradient and code becomes that between gradient and z.
    Where z or code is 0 nothing can be turned: the gradient passes straight through.
    """
    with torch.no_grad():
        z_norm, code_norm = z.norm(dim=-1, keepdim=True), code.norm(dim=-1, keepdim=True)
        u, q = F.normalize(z, dim=-1), F.normalize(code, dim=-1)
        r = F.normalize(u + q, dim=-1)
        scale = code_norm / z_norm.clamp(min=_EPS)
    turned = scale * (z - 2 * (z * r).sum(-1, keepdim=True) * r + 2 * (z * u).sum(-1, keepdim=True) * q)
    passed = torch.where((z_norm > _EPS) & (code_norm > _EPS), turned, z)
    # The values are the code's to the last bit.
    return code.detach() + (passed - passed.detach())


class RotationQuantiser(VectorQuantiser):
    """`VectorQuantiser` with the gradient of `rotated` in place of the straight-through one."""

    def _passed(self, z: Tensor, nearest: Tensor) -> Tensor:
        return rotated(z, nearest)
