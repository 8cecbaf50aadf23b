"""The contract of the bottleneck between inverse dynamics and generator: z in, latent actions and their loss out."""

from __future__ import annotations

from abc import abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Quantised(NamedTuple):
    """What a `Bottleneck` returns for ``z [B, M, N, D]``.

    A tuple, because engines that partition parameters (ZeRO stage 3) look for tensors in tuples, and only there, to hook the backward pass.
    """

    actions: Tensor
    """fp32 ``[B, M, N, D]``: what the generator is conditioned on; carries the gradient back to z."""
    codes: Tensor
    """int64 ``[B, M, N]``, each in 0 ... K-1; ``[B, M, 0]`` where there are no codes."""
    loss: Tensor
    """Scalar with gradient: the sum of the bottleneck's terms, weighted as configured. A mean over tokens."""
    codebook_loss: Tensor
    """||sg[z] - e||^2, mean over elements; scalar, not weighted, 0 for kinds without."""
    commitment_loss: Tensor
    """||z - sg[e]||^2, mean over elements; scalar, not weighted, 0 for kinds without."""
    regulariser: Tensor
    """The divergence of `ContinuousLatents` or the entropy term of kinds with a codebook; scalar, not weighted, 0 where neither applies."""


class Bottleneck(nn.Module):
    """How much of z passes on to the generator, and in which form. Computes in fp32 whatever the autocast type."""

    codes: int
    """K, how many codes there are; 0 where latent actions are continuous."""
    samples = False
    """Whether training has to give noise to ``forward``."""

    def __init__(self, codes: int) -> None:
        super().__init__()
        self.codes = codes

    @abstractmethod
    def forward(self, z: Tensor, step: int | None = None, noise: Tensor | None = None) -> Quantised:
        """Latent actions of ``z [B, M, N, D]``.

        ``step`` is the optimizer step and is given in training only: it lets codes be placed on z of the batch. ``noise [B, M, N, D]`` is N(0, 1) for
        kinds that sample; without it they give the mean. Under data parallelism placing communicates: every rank must then call with equally many z.
        """

    @abstractmethod
    def metrics(self, quantised: Quantised) -> dict[str, Tensor]:
        """The terms of ``quantised`` that this kind has, by name, detached and not weighted."""

    def features(self, quantised: Quantised) -> Tensor:
        """What a probe reads, fp32 ``[B*M, F]``: here the codes one-hot per slot, ``F = N*K``.

        One-hot, so that the probe asks what the codes say and not how their embeddings happen to lie.
        """
        return F.one_hot(quantised.codes.flatten(0, 1), self.codes).flatten(1).float()

    def actions_of(self, codes: Tensor) -> Tensor:
        """The latent actions that ``codes``, int64 ``[...]``, stand for: fp32 ``[..., D]``. Raises `ValueError` where there are none."""
        raise ValueError("this bottleneck has no codes")

    @torch.no_grad()
    def place(self, rows: Tensor) -> None:
        """Fit to the tokens ``rows [R, D]``, R >= 1, so that z of an untrained inverse dynamics use many codes; nothing where there are none.

        On this rank alone, and not for a bottleneck that an optimizer holds: it may write weights.
        """
