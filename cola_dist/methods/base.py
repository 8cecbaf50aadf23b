"""The contract between what is optimised (a method) and how (the training loop)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor, nn

from cola_dist.methods.schedule import Phase
from cola_dist.models.autoencoder import Autoencoder
from cola_dist.models.world import WorldModel


@dataclass
class Clips:
    """A batch of one worker."""

    video: Tensor
    """uint8 ``[B, T, 3, H, W]``."""
    position: Tensor
    """int64 ``[B]``, global position in the order of clips; keys all randomness of a clip. Always in host memory: there it is read."""
    source: Tensor
    """int64 ``[B]``, index of the source in the mixture."""
    latents: Tensor | None = None
    """fp32 ``[B, L, C, h, w]``, the autoencoder's latents of ``video``, where they were made beforehand."""
    actions: Tensor | None = None
    """fp32 ``[B, T-1, A]``, a robot's real actions in its own units, where the method needs them: row t leads from frame t to t + 1."""
    state: Tensor | None = None
    """fp32 ``[B, T, S]``, its state at each frame, where the method needs it."""

    def to(self, device: torch.device | str) -> Clips:
        """The same clips on ``device``, but for their positions: to read them back would wait for all that the device has to do."""
        return replace(self._each(partial(Tensor.to, device=device, non_blocking=True)), position=self.position)

    def split(self, size: int) -> list[Clips]:
        """The same clips in parts of ``size``; the last one may be smaller."""
        return [self._each(itemgetter(slice(first, first + size))) for first in range(0, len(self), size)]

    def _each(self, change: Callable[[Tensor], Tensor]) -> Clips:
        return replace(self, **{name: change(tensor) for name, tensor in vars(self).items() if tensor is not None})

    def __len__(self) -> int:
        return len(self.video)


@dataclass
class StepOutput:
    """What one differentiable step gives back."""

    loss: Tensor
    """Scalar with gradient. A mean over clips: averaged over equal shards it is the mean over the global batch."""
    metrics: dict[str, Tensor]
    """Detached scalars, averaged over shards as the loss is."""
    codes: Tensor | None
    """int64 ``[B, T-1, N]``; none where the method has no latent actions."""


class Method(nn.Module):
    """One differentiable step. Each role is a direct submodule of the role's name."""

    world: WorldModel
    """The generator, role "world", which every method has."""

    def __init__(self, bf16: bool, autoencoder: Autoencoder) -> None:
        super().__init__()
        self.bf16 = bf16
        self.autoencoder = autoencoder

    def latents(self, clips: Clips) -> Tensor:
        """What the generator models, ``[B, L, C, h, w]``: made beforehand, or encoded now."""
        return clips.latents if clips.latents is not None else self.autoencoder.encode(clips.video)

    @abstractmethod
    def roles(self) -> tuple[str, ...]:
        """Names of the roles, in the order of their parameter groups."""

    def role_parameters(self, role: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters of a role with the names that ``named_parameters`` gives them."""
        return self.get_submodule(role).named_parameters(prefix=role)

    def set_phase(self, phase: Phase) -> None:
        """Let the roles of ``phase`` train. The rest costs no weight gradient; gradients still flow through it to what it is given."""
        for role in self.roles():
            for _, parameter in self.role_parameters(role):
                parameter.requires_grad_(role in phase.trains)
                if role not in phase.trains:
                    parameter.grad = None

    @abstractmethod
    def forward(self, clips: Clips, step: int) -> StepOutput:
        """Loss of one (micro-)batch. ``step`` is the optimizer step, the same on every rank and micro-batch."""

    @abstractmethod
    def evaluate(self, clips: Clips) -> dict[str, Tensor]:
        """Additive sums over held-out clips for `cola_dist.diagnostics`; the sums of batches and ranks add up to those of the whole set."""

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16)
