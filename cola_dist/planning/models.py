"""What a planner imagines with: a learned model, or the simulator itself (the upper bound)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from cola_dist.errors import UserError
from cola_dist.evaluation.imagine import Sampling, imagine, keyed_noise, sampling_of
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import to_video
from cola_dist.planning.domains import Domain, Frame
from cola_dist.planning.objective import resized
from cola_dist.planning.planner import ActionSpace, Floats
from cola_dist.planning.watch import Watch

Adapter = Callable[[Tensor], Tensor]
"""Raw actions fp32 ``[B, T-1, A]`` to latent actions ``[B, T-1, N, D]``."""


@dataclass(frozen=True)
class Moment:
    """What is known when a plan is made."""

    frames: Sequence[Frame]
    """All frames of the episode so far, at least the first."""
    actions: Sequence[Floats]
    """The actions between them."""
    state: Any
    """The domain's, which only the simulator may look at."""
    seed: int
    """The episode's."""


class Imagination(Protocol):
    """Answers what would be seen."""

    def observe(self, moment: Moment, watch: Watch) -> None:
        """From now on imagine from this moment."""

    def rollout(self, actions: Floats, watch: Watch) -> Tensor:
        """Frames uint8 ``[S, H, 3, h, w]`` that follow the moment under ``actions [S, H, A]``."""


class SimulatorModel:
    """A second instance of the domain, put into the first one's state."""

    def __init__(self, twin: Domain) -> None:
        self._twin = twin

    def observe(self, moment: Moment, watch: Watch) -> None:
        if len(moment.frames) == 1:
            self._twin.reset(moment.seed)
        self._state = moment.state

    def rollout(self, actions: Floats, watch: Watch) -> Tensor:
        with watch.part("rollout"):
            futures = []
            for sequence in actions:
                self._twin.set_state(self._state)
                futures.append(np.stack([self._twin.step(action) for action in sequence]))
            return torch.from_numpy(np.stack(futures)).permute(0, 1, 4, 2, 3)


class LearnedModel:
    """A generator that is steered through an adapter. All sequences of a step share their noise, so that they differ by their actions alone.

    Its context is what really happened: one latent frame at an episode's begin, up to ``sampling.context`` later on (VP2 shows its models the first
    frame twice instead).
    """

    def __init__(self, method: CoTrain, adapter: Adapter, sampling: Sampling, device: torch.device, at_once: int) -> None:
        """``at_once``: how many sequences are imagined together; the others wait for memory's sake."""
        self._method, self._adapter, self._sampling, self._device, self._at_once = method, adapter, sampling, device, at_once

    @torch.no_grad()
    def observe(self, moment: Moment, watch: Watch) -> None:
        with watch.part("encode"):
            stride = self._method.autoencoder.shape.stride
            latents = min(self._sampling.context, 1 + (len(moment.frames) - 1) // stride)
            self._seen = 1 + (latents - 1) * stride
            frames = torch.from_numpy(np.stack(moment.frames[-self._seen :])).permute(0, 3, 1, 2).to(self._device)
            side = self._method.config.data.resolution
            # The same scale as in the generator's training: [-1, 1], means over areas.
            self._context = self._method.autoencoder.encode(to_video(resized(frames, side) * 2 - 1)[None])
            past = moment.actions[len(moment.actions) - (self._seen - 1) :]
            self._past = np.array(past, np.float32).reshape(self._seen - 1, -1) if past else None
            self._key = torch.tensor([(moment.seed + len(moment.frames)) % 2**62])

    @torch.no_grad()
    def rollout(self, actions: Floats, watch: Watch) -> Tensor:
        with watch.part("rollout"):
            return torch.cat([self._imagine(actions[at : at + self._at_once]) for at in range(0, len(actions), self._at_once)])

    def _imagine(self, actions: Floats) -> Tensor:
        count, horizon, _ = actions.shape
        parts = [] if self._past is None else [np.broadcast_to(self._past, (count, *self._past.shape))]
        # Latent frames take r actions each; the last one is filled up, and the frames of that are cut off.
        filled = -horizon % self._method.autoencoder.shape.stride
        raw = np.concatenate([*parts, actions, np.repeat(actions[:, -1:], filled, 1)], 1).astype(np.float32)
        latent = self._adapter(torch.from_numpy(raw).to(self._device))
        drawn = keyed_noise(self._method.config.train.seed, self._key, tuple(self._context.shape[2:]), self._device)
        context = self._context.expand(count, -1, -1, -1, -1)
        pieces = imagine(
            self._method, context, latent, lambda first, last: drawn(first, last).expand(count, -1, -1, -1, -1), self._sampling
        )
        frames = torch.cat([piece.frames for piece in pieces], 1)
        return frames[:, self._seen : self._seen + horizon]


def open_learned(uri: str, domain: str, space: ActionSpace, device: torch.device, sampler_steps: int, at_once: int) -> LearnedModel:
    """The adapted model at ``uri``. Raises `UserError` for what is none, or is adapted to other actions than the domain's."""
    from cola_dist.planning.adapter import load_adapted

    method, adapter = load_adapted(uri, device)
    check_adapter(adapter, method, uri, domain, space, device)
    return LearnedModel(method, adapter, sampling_of(method.config, sampler_steps), device, at_once)


@torch.no_grad()
def check_adapter(adapter: Adapter, method: CoTrain, uri: str, domain: str, space: ActionSpace, device: torch.device) -> None:
    """Raises `UserError` where the adapter does not take the domain's actions."""
    transitions = method.autoencoder.shape.stride
    lam = method.config.lam
    try:
        shape = tuple(adapter(torch.zeros(1, transitions, space.size, device=device)).shape)
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{uri}: its adapter does not take the {space.size} action dimensions of {domain} ({reason}): adapt the model to {domain}'s actions"
        ) from None
    if shape != (1, transitions, lam.tokens, lam.bottleneck.dim):
        raise UserError(f"{uri}: its adapter gives {list(shape)}, not {lam.tokens} tokens of {lam.bottleneck.dim}: adapt the model again")
