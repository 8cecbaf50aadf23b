"""Vector quantisation of latent actions (van den Oord et al. 2017, arXiv 1711.00937): the faithful baseline."""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck.codebook import CodebookQuantiser, draw_rows


def _gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks in rank order (equally many on each), so that every rank takes the same decision about the codebook."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


class VectorQuantiser(CodebookQuantiser):
    """A trained codebook, whose codes may be placed on z: all at the start, or again and again those that died.

    A code is the sum of a trained weight and of ``offset``, a buffer. Placing a code on a z (initialisation from data, dead-code reset)
    writes the buffer: an optimizer that keeps its own copy of the weights (ZeRO does) would undo a write into the weight at its next
    step. With the faithful settings the offset stays 0.
    """

    offset: Tensor
    uses: Tensor
    placed: Tensor
    last_reset: Tensor

    def __init__(self, config: BottleneckConfig, seed: int) -> None:
        super().__init__(config, seed)
        size = (config.codes, config.dim)
        start = torch.randn(size) if config.init == "normal" else (torch.rand(size) * 2 - 1) / config.codes
        self.weight = nn.Parameter(self._comparable(start))
        self.register_buffer("offset", torch.zeros(size))
        self.register_buffer("uses", torch.zeros(config.codes, dtype=torch.int64))
        self.register_buffer("placed", torch.tensor(config.init != "data"))
        self._known_placed = config.init != "data"
        self.register_buffer("last_reset", torch.tensor(0))

    @property
    def codebook(self) -> Tensor:
        """fp32 ``[K, D]``."""
        return self.weight.float() + self.offset

    def _count(self, codes: Tensor) -> None:
        if not self.config.reset_every:
            return
        counts = torch.bincount(codes, minlength=self.config.codes)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(counts)
        self.uses += counts

    def _place(self, rows: Tensor, step: int) -> None:
        """Put all codes (first batch of ``init: data``) or the unused ones (every ``reset_every`` steps) onto z drawn from the batch."""
        every = self.config.reset_every
        # Read until it is so, not at every step: it waits for the device, and codes are not taken up again.
        self._known_placed = self._known_placed or bool(self.placed)
        if not self._known_placed:
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
        """Put every code onto a z drawn from ``rows [R, D]``, on this rank alone."""
        self._move(torch.ones_like(self.uses, dtype=torch.bool), self._comparable(rows.float()), 0)

    def _move(self, dead: Tensor, candidates: Tensor, step: int) -> None:
        chosen = draw_rows(candidates, len(dead), self.seed * 1_000_003 + step)
        self.offset.copy_(torch.where(dead[:, None], chosen - self.weight.detach().float(), self.offset))
        self.placed.fill_(True)
