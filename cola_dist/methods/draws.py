"""All chance of a step: one stream per clip and purpose.

Each stream is seeded by a hash of (run's seed, clip's global position, purpose), so what a clip is given depends neither on the clips
beside it, nor on the number of workers, nor on restarts. Streams of the CPU and of CUDA differ from each other.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from cola_dist.config import FlowConfig
from cola_dist.models.flow import flow_time


class Draws:
    """Draws for the clips at ``position``, an int64 tensor ``[B]``."""

    def __init__(self, seed: int, position: Tensor, device: torch.device) -> None:
        self._seed = seed
        self._positions: list[int] = position.tolist()
        self._device = device

    def _stream(self, generator: torch.Generator, position: int, purpose: str) -> torch.Generator:
        key = hashlib.blake2b(f"{self._seed}/{position}/{purpose}".encode(), digest_size=8).digest()
        # Bits above 63 do not fit a signed seed.
        return generator.manual_seed(int.from_bytes(key, "little") >> 1)

    def uniform(self, purpose: str, *shape: int) -> Tensor:
        """U[0, 1) of ``[B, *shape]``, drawn on the CPU: few numbers, the same on any device."""
        generator = torch.Generator()
        rows = [torch.rand(shape, generator=self._stream(generator, position, purpose)) for position in self._positions]
        # The host goes on; what it copies from is pageable and taken over at once.
        return torch.stack(rows).to(self._device, non_blocking=True)

    def normal(self, purpose: str, *shape: int) -> Tensor:
        """N(0, 1) of ``[B, *shape]``, drawn on the clips' device."""
        generator = torch.Generator(self._device)
        out = torch.empty(len(self._positions), *shape, device=self._device)
        for row, position in zip(out, self._positions, strict=True):
            row.normal_(generator=self._stream(generator, position, purpose))
        return out

    def flow_time(self, config: FlowConfig) -> Tensor:
        """Flow time of each clip, ``[B]``."""
        return flow_time(self.uniform("tau"), config)

    def context(self, config: FlowConfig, frames: int) -> Tensor:
        """Clean context frames of each clip, int64 ``[B]``, uniform over 1 ... ``context_max`` (0 = L - 1)."""
        longest = min(config.context_max or frames - 1, frames - 1)
        return 1 + (self.uniform("context") * longest).long()

    def dropped(self, probability: float, transitions: int) -> Tensor:
        """Whether each transition's action is replaced by the null action, bool ``[B, T-1]``."""
        return self.uniform("dropout", transitions) < probability
