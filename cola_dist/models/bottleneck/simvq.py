"""SimVQ (Zhu et al. 2024, arXiv 2411.02038): one linear map is trained in place of the codes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.codebook import CodebookQuantiser, draw_rows


class SimVQ(CodebookQuantiser):
    """The codebook is ``basis @ map``: K fixed random rows, N(0, 1/D), through one trained ``[D, D]`` map.

    Every gradient moves the map and with it all codes, those without a z as well, so no code dies alone and none is ever placed: ``init`` and
    ``reset_every`` have no meaning. As in the paper the map has no bias (the authors' code adds one); it starts as ``nn.Linear`` does,
    U(±1/sqrt(D)), so codes start with a standard deviation of about 0.6/sqrt(D) per element.
    """

    basis: Tensor

    def __init__(self, config: BottleneckConfig, seed: int) -> None:
        super().__init__(config, seed)
        self.register_buffer("basis", torch.randn(config.codes, config.dim) * config.dim**-0.5)
        self.map = nn.Parameter((torch.rand(config.dim, config.dim) * 2 - 1) * config.dim**-0.5)

    @property
    def codebook(self) -> Tensor:
        """fp32 ``[K, D]``."""
        return self.basis @ self.map.float()

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Put every code onto a z drawn from ``rows [R, D]``: those become the basis, and the map the identity."""
        self.basis.copy_(draw_rows(rows.float(), self.codes, self.seed))
        self.map.copy_(torch.eye(len(self.map)))
