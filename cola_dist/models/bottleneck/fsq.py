"""Finite scalar quantisation (Mentzer et al. 2023, arXiv 2309.15505): a grid in place of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_dist.config import BottleneckConfig, fsq_levels
from cola_dist.models.bottleneck.base import Bottleneck, Quantised

_MARGIN = 1e-3
"""Keeps bounded values off the border at which they would round outwards (appendix A.1)."""


class FiniteScalarQuantiser(Bottleneck):
    """D -> d scalars -> the nearest of L_i integers each -> D, with d and L = `fsq_levels` of ``codes``.

    There is no codebook and no loss: the two projections learn from what the generator tells them alone. The code of a token is the number
    whose digits are its d integers, the first one the lowest. The generator sees the projection of the integers, which are scaled to [-1, 1].
    """

    levels: Tensor

    def __init__(self, config: BottleneckConfig) -> None:
        super().__init__(config.codes)
        levels = fsq_levels(config.codes)
        assert levels, f"settings refuse {config.codes} codes"
        self.down = nn.Linear(config.dim, len(levels))
        self.up = nn.Linear(len(levels), config.dim)
        self.register_buffer("levels", torch.tensor(levels))

    def forward(self, z: Tensor, step: int | None = None, noise: Tensor | None = None) -> Quantised:
        """The grid point next to each token. There is no loss: its terms are 0."""
        with torch.autocast(z.device.type, enabled=False):
            bounded = self._bounded(self.down(z.float()))
            # The values are integers to the last bit, the gradient passes straight through the rounding.
            scalars = bounded.round().detach() + (bounded - bounded.detach())
            half = self.levels // 2
            places = self.levels.cumprod(0) // self.levels
            codes = ((scalars.detach().long() + half) * places).sum(-1)
            none = z.new_zeros((), dtype=torch.float32)
            return Quantised(self.up(scalars / half), codes, none, none, none, none)

    def actions_of(self, codes: Tensor) -> Tensor:
        """The projection of the integers that are the codes' digits."""
        half = self.levels // 2
        scalars = codes[..., None] // (self.levels.cumprod(0) // self.levels) % self.levels - half
        actions: Tensor = self.up(scalars / half)
        return actions

    def metrics(self, quantised: Quantised) -> dict[str, Tensor]:
        """None."""
        return {}

    def _bounded(self, scalars: Tensor) -> Tensor:
        """``[..., d]`` into (-L/2, L/2), shifted by half a step where L is even, so that exactly L integers are nearest to some value.

        Appendix A.1, with the inverse hyperbolic tangent where the paper's code has a tangent (equal to within 4e-4 here): 0 then stays 0.
        """
        reach = (self.levels - 1) * (1 - _MARGIN) / 2
        offset = 0.5 * (self.levels % 2 == 0)
        return torch.tanh(scalars + torch.atanh(offset / reach)) * reach - offset

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Scale the first projection so that each scalar of ``rows [R, D]`` has mean 0 and standard deviation 1, and reaches most levels."""
        scalars = self.down(rows.float())
        mean, std = scalars.mean(0), scalars.std(0, correction=0).clamp(min=1e-8)
        self.down.weight.div_(std[:, None])
        self.down.bias.sub_(mean).div_(std)
