"""Vector quantisation of latent actions (van den Oord et al. 2017, arXiv 1711.00937), one codebook shared by all slots."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from cola_dist.config import BottleneckConfig


class Quantised(NamedTuple):
    """What `VectorQuantiser` returns for ``z [B, M, N, D]``.

    A tuple, because engines that partition parameters (ZeRO stage 3) look for tensors in tuples, and only there, to hook the backward pass.
    """

    actions: Tensor
    """fp32 ``[B, M, N, D]``: values are the nearest codes, the gradient passes straight through to z."""
    codes: Tensor
    """int64 ``[B, M, N]``."""
    codebook_loss: Tensor
    """||sg[z] - e||^2, mean over elements; scalar."""
    commitment_loss: Tensor
    """||z - sg[e]||^2, mean over elements; scalar."""


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order (equally many on each), so that every rank takes the same decision about the codebook."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class VectorQuantiser(nn.Module):
    """Nearest code by Euclidean distance, in fp32 whatever the autocast type, without moving averages.

    A code is the sum of a trained weight and of ``offset``, a buffer. Placing a code on a z (initialisation from data, dead-code reset)
    writes the buffer: an optimizer that keeps its own copy of the weights (ZeRO does) would undo a write into the weight at its next
    step. With the faithful settings the offset stays 0.
    """

    offset: Tensor
    uses: Tensor
    placed: Tensor
    last_reset: Tensor

    def __init__(self, config: BottleneckConfig, seed: int) -> None:
        super().__init__()
        self.config = config
        self.seed = seed
        size = (config.codes, config.dim)
        start = torch.randn(size) if config.init == "normal" else (torch.rand(size) * 2 - 1) / config.codes
        self.weight = nn.Parameter(start)
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("uses", torch.zeros(config.codes, dtype=torch.int64))
        self.register_buffer("placed", torch.tensor(config.init != "data"))
        self.register_buffer("last_reset", torch.tensor(0))

    @property
    def codebook(self) -> Tensor:
        """fp32 ``[K, D]``."""
        return self.weight.float() + self.offset

    def forward(self, z: Tensor, step: int | None = None) -> Quantised:
        """Quantise ``z [B, M, N, D]``. ``step`` is given in training only: it lets codes be placed on z of the batch.

        Under data parallelism that placement communicates: every rank must then call with equally many z.
        """
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            rows = z.detach().reshape(-1, z.shape[-1])
            if step is not None:
                self._place(rows, step)
            codebook = self.codebook
            codes = torch.cdist(rows, codebook.detach(), compute_mode="donot_use_mm_for_euclid_dist").argmin(-1)
            if step is not None and self.config.reset_every:
                self._count(codes)
            nearest = F.embedding(codes, codebook).reshape(z.shape)
            return Quantised(
                actions=z + (nearest - z).detach(),
                codes=codes.reshape(z.shape[:-1]),
                codebook_loss=F.mse_loss(nearest, z.detach()),
                commitment_loss=F.mse_loss(z, nearest.detach()),
            )

    def _count(self, codes: Tensor) -> None:
        counts = torch.bincount(codes, minlength=self.config.codes)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self.uses += counts

    def _place(self, rows: Tensor, step: int) -> None:
        """Put all codes (first batch of ``init: data``) or the unused ones (every ``reset_every`` steps) onto z drawn from the batch."""
        every = self.config.reset_every
        if not self.placed:
            dead = torch.ones_like(self.uses, dtype=torch.bool)
        elif every and step % every == 0 and step > int(self.last_reset):
            dead = self.uses == 0
            self.uses.zero_()
            self.last_reset.fill_(step)
        else:
            return
        self._move(dead, _gather_rows(rows), step)

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Put every code onto a z drawn from ``rows [M, D]``, on this rank alone."""
        self._move(torch.ones_like(self.uses, dtype=torch.bool), rows.float(), 0)

    def _move(self, dead: Tensor, candidates: Tensor, step: int) -> None:
        draw = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        order = torch.randperm(len(candidates), generator=draw)
        chosen = candidates[order[torch.arange(len(dead)) % len(order)].to(candidates.device)]
        self.offset.copy_(torch.where(dead[:, None], chosen - self.weight.detach().float(), self.offset))
        self.placed.fill_(True)
