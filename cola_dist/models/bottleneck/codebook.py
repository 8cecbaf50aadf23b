"""What all kinds with a codebook share: the nearest code, its losses, and the straight-through gradient."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.base import Bottleneck, Quantised
from cola_dist.models.bottleneck.entropy import entropy_term


def draw_rows(rows: Tensor, count: int, seed: int) -> Tensor:
    """``count`` different rows of ``rows [R, D]``, or each of them again and again where there are fewer."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[torch.arange(count) % len(order)].to(rows.device)]


class CodebookQuantiser(Bottleneck):
    """Nearest code by Euclidean distance, one codebook shared by all slots, without moving averages."""

    def __init__(self, config: BottleneckConfig, seed: int) -> None:
        """``seed`` chooses the z that codes are placed on; weights come from torch's global generator."""
        super().__init__(config.codes)
        self.config = config
        self.seed = seed

    @property
    @abstractmethod
    def codebook(self) -> Tensor:
        """fp32 ``[K, D]``, with gradient to what is trained."""

    def forward(self, z: Tensor, step: int | None = None, noise: Tensor | None = None) -> Quantised:
        """The nearest code of each token. The loss is that of VQ-VAE (1711.00937, equation 3) and the optional `entropy_term`."""
        config = self.config
        with torch.autocast(z.device.type, enabled=False):
            z = self._comparable(z.float())
            rows = z.reshape(-1, z.shape[-1])
            if step is not None:
                self._place(rows.detach(), step)
            codebook = self.codebook
            codes = torch.cdist(rows.detach(), codebook.detach(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
            if step is not None:
                self._count(codes)
            nearest = F.embedding(codes, codebook).reshape(z.shape)
            codebook_loss = F.mse_loss(nearest, z.detach())
            commitment_loss = F.mse_loss(z, nearest.detach())
            loss = config.codebook_weight * codebook_loss + config.commitment_weight * commitment_loss
            regulariser = torch.zeros_like(loss)
            if config.entropy_weight:
                regulariser = entropy_term(rows, codebook)
                loss = loss + config.entropy_weight * regulariser
            actions = self._passed(z, nearest.detach())
            return Quantised(actions, codes.reshape(z.shape[:-1]), loss, codebook_loss, commitment_loss, regulariser)

    def metrics(self, quantised: Quantised) -> dict[str, Tensor]:
        """``codebook_loss``, ``commitment_loss``, and ``entropy`` (`entropy_term`) where it has a weight."""
        terms = {"codebook_loss": quantised.codebook_loss, "commitment_loss": quantised.commitment_loss}
        if self.config.entropy_weight:
            terms["entropy"] = quantised.regulariser
        return {name: value.detach() for name, value in terms.items()}

    def actions_of(self, codes: Tensor) -> Tensor:
        """Rows of the codebook."""
        return F.embedding(codes, self.codebook)

    def _comparable(self, z: Tensor) -> Tensor:
        """z as it is compared with codes and passed on."""
        return z

    def _passed(self, z: Tensor, nearest: Tensor) -> Tensor:
        """The actions: values of ``nearest``, with a gradient to z."""
        return z + (nearest - z).detach()

    def _place(self, rows: Tensor, step: int) -> None:
        """Put codes onto z of the batch, before they are compared with it, where this kind does so."""

    def _count(self, codes: Tensor) -> None:
        """Take note of the codes that the batch used, where this kind needs to know."""
