"""What a run will need, from its configuration alone: parameters, operations, memory, traffic, time. Nothing is loaded, no accelerator is touched.

Modules are built and run on tensors without memory, as their phases train them, so operations and kept activations are counted and not guessed.
What they cost on a named accelerator is a model of it: see `Accelerator`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cola_dist.config import AUTOENCODERS, RunConfig
from cola_dist.methods import Phase, build_world, phases
from cola_dist.models.adapter import ActionAdapter
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.lam import InverseDynamics
from cola_dist.models.world.base import PRODUCTS, checkpoint_blocks

UTILISATION = 0.4
"""Share of an accelerator's peak that training steps are taken to reach. Not yet measured on one."""
_WEIGHT, _GRADIENT, _MOMENTS = 4, 4, 8
"""Bytes per trained parameter: fp32 weight, fp32 gradient, Adam's two moments."""
_DEPTHS = ("lam", "conditioning", "world")
"""Sections of the configuration that have a depth."""
_ROLES = {
    "cotrain": ("lam", "conditioning", "world"),
    "pretrain": ("world",),
    "adapt": ("adapter", "lam", "conditioning", "world"),
}


@dataclass(frozen=True)
class Accelerator:
    """Peak bf16 operations per second (dense), memory in bytes, and bytes per second between accelerators of one machine, one way."""

    flops: float
    memory: float
    link: float


ACCELERATORS: Mapping[str, Accelerator] = {
    "h200": Accelerator(989e12, 141e9, 450e9),
    "h100": Accelerator(989e12, 80e9, 450e9),
    "a100": Accelerator(312e12, 80e9, 300e9),
    "rtx4090": Accelerator(165e12, 24e9, 32e9),
}


@dataclass(frozen=True)
class Checkpointing:
    """A choice of what the generator's blocks keep for backward."""

    kept: int
    """Bytes that one worker keeps for backward, of one micro-batch."""
    again: float
    """Operations per step, of all workers together, that backward computes again; norms, gates and the like do not count."""


@dataclass(frozen=True)
class PhasePlan:
    """One phase of a run, per optimizer step."""

    name: str
    trains: tuple[str, ...]
    flops: Mapping[str, float]
    """Of all workers together: ``autoencoder``, ``forward`` and ``backward``; what activation checkpointing computes again is in ``backward``."""
    activations: int
    """Bytes that one worker keeps for backward, of one micro-batch."""
    checkpointing: Mapping[str, Checkpointing]
    """What each of the choices would be: ``off``, ``inputs`` and ``products``."""
    states: tuple[int, int, int, int]
    """Bytes of weights, gradients and optimizer of one worker at ZeRO stage 0, 1, 2 and 3."""
    traffic: tuple[int, int, int, int]
    """Bytes that one worker sends per step at each stage."""

    def memory(self, stage: int) -> int:
        """Bytes of one worker; what libraries, kernels and fragmentation take comes on top."""
        return self.states[stage] + self.activations

    def seconds(self, accelerator: Accelerator, workers: int, stage: int) -> float:
        """Of one step: operations at `UTILISATION` of the peak, then traffic, which in truth overlaps in part."""
        return sum(self.flops.values()) / workers / (accelerator.flops * UTILISATION) + self.traffic[stage] / accelerator.link


@dataclass(frozen=True)
class Plan:
    """What a run will need."""

    parameters: Mapping[str, int]
    phases: tuple[PhasePlan, ...]
    """Those that ask the generator; a phase of the LAM alone is not planned for."""
    checkpoint_bytes: int
    """Weights and moments of all roles that ever train."""


def estimate(config: RunConfig) -> Plan:
    """Count what ``config`` asks for. Needs no checkpoint: shapes are the configuration's."""
    with FakeTensorMode():
        family = _family(config)
        parameters = {role: round(_grown(config, [_size(parts, role) for parts in family])) for role in _ROLES[config.method]}
        encoding = config.optim.global_batch * _encoder_flops(config)
        plans = tuple(_phase_plan(config, phase, family, parameters, encoding) for phase in phases(config) if phase.objective == "flow")
    trained = {role for phase in phases(config) for role in phase.trains}
    return Plan(parameters, plans, (_WEIGHT + _MOMENTS) * sum(parameters[role] for role in trained))


def _family(config: RunConfig) -> list[_Parts]:
    """The roles with one block each, and then, for each role, with a second one there. Blocks are alike, so all that is counted grows evenly."""
    small = replace(config, **{role: replace(getattr(config, role), depth=1) for role in _DEPTHS})
    return [_Parts(small), *(_Parts(replace(small, **{role: replace(getattr(small, role), depth=2)})) for role in _DEPTHS)]


def _grown(config: RunConfig, figures: Sequence[float]) -> float:
    """A figure of the whole run from those of a `_family`."""
    first, *more = figures
    more_blocks: float = sum((other - first) * (getattr(config, role).depth - 1) for role, other in zip(_DEPTHS, more, strict=True))
    return first + more_blocks


def _size(parts: nn.Module, role: str) -> int:
    return sum(p.numel() for p in parts.get_submodule(role).parameters())


class _Parts(nn.Module):
    """The roles, joined as a co-training step joins them; quantiser and loss, which cost next to nothing, left out."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__()
        self.config, latents = config, AUTOENCODERS[config.autoencoder.kind]
        self.world = build_world(replace(config, world=replace(config.world, pretrained=None, null_prompt=None)))
        self.lam = InverseDynamics(config.lam)
        actions = (config.lam.tokens, config.lam.bottleneck.dim)
        self.conditioning = ActionConditioning(config.conditioning, *actions, self.world.modulation_shape, latents.stride)
        adapt = config.adapt
        self.adapter = ActionAdapter(adapt.kind, max(1, adapt.action_dim), adapt.state_dim, *actions, adapt.width)

    def forward(self, clips: int) -> Tensor:
        x, tau = self.latents(clips)
        out: Tensor = self.world(x, tau, self.modulation(clips))
        return out.square().mean()

    def latents(self, clips: int) -> tuple[Tensor, Tensor]:
        """x_tau and tau of so many clips."""
        data, shape = self.config.data, AUTOENCODERS[self.config.autoencoder.kind]
        frames, side = 1 + (data.frames - 1) // shape.stride, data.resolution // shape.shrinks
        return torch.zeros(clips, frames, shape.channels, side, side), torch.ones(clips, frames)

    def modulation(self, clips: int) -> Tensor | None:
        """What actions make of so many clips; none in pretraining."""
        if self.config.method == "pretrain":
            return None
        data = self.config.data
        latent: Tensor = self.lam(torch.zeros(clips, data.frames, 3, data.resolution, data.resolution))
        if self.config.method == "adapt":
            # The LAM is asked all the same: the adapter's tokens are compared with its actions.
            given = (torch.zeros(clips, data.frames - 1, dim) for dim in (self.adapter.action_dim, self.adapter.state_dim) if dim)
            latent = self.adapter(*given)
        made: Tensor = self.conditioning(latent)
        return made


def _phase_plan(config: RunConfig, phase: Phase, family: Sequence[_Parts], parameters: Mapping[str, int], encoding: float) -> PhasePlan:
    workers = config.train.workers
    share = config.optim.global_batch // workers
    micro = config.optim.micro_batch or share
    for parts in family:
        for role in parameters:
            parts.get_submodule(role).requires_grad_(role in phase.trains)
    forward, backward = (_grown(config, figures) for figures in zip(*(_step_flops(parts, micro) for parts in family), strict=True))
    rounds = workers * share // micro
    checkpointing = {name: replace(way, again=way.again * rounds) for name, way in _checkpointing(config, family, micro).items()}
    way = checkpointing[config.train.checkpointing_keeps if config.train.activation_checkpointing else "off"]
    trained = sum(parameters[role] for role in phase.trains)
    frozen = sum(parameters.values()) - trained
    return PhasePlan(
        phase.name,
        tuple(phase.trains),
        {"autoencoder": encoding, "forward": forward * rounds, "backward": backward * rounds + way.again},
        way.kept,
        checkpointing,
        state_bytes(trained, frozen, workers),
        traffic_bytes(trained, frozen, workers, rounds // workers),
    )


def _checkpointing(config: RunConfig, family: Sequence[_Parts], clips: int) -> dict[str, Checkpointing]:
    """By what blocks keep: bytes, and operations that are computed again of so many clips."""
    plain = [_kept_bytes(parts, clips) for parts in family]
    # Backward makes each block's activations again, one block at a time.
    in_hand = plain[-1] - plain[0]
    with _checkpointed(family):
        inputs = [_kept_bytes(parts, clips) for parts in family]
    with torch.no_grad():
        products = [size + _product_bytes(parts, clips) for size, parts in zip(inputs, family, strict=True)]
        again = _grown(config, [_flops(partial(parts.world, *parts.latents(clips), None)) for parts in family])
    return {
        "off": Checkpointing(round(_grown(config, plain)), 0.0),
        "inputs": Checkpointing(round(_grown(config, inputs) + in_hand), again),
        "products": Checkpointing(round(_grown(config, products) + in_hand), 0.0),
    }


def state_bytes(trained: int, frozen: int, workers: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients and optimizer of one worker at ZeRO stage 0, 1, 2 and 3, for so many parameters."""
    weights, gradients, moments = _WEIGHT * trained, _GRADIENT * trained, _MOMENTS * trained
    still = _WEIGHT * frozen
    return (
        weights + gradients + moments + still,
        weights + gradients + moments // workers + still,
        weights + (gradients + moments) // workers + still,
        (weights + gradients + moments + still) // workers,
    )


def traffic_bytes(trained: int, frozen: int, workers: int, rounds: int) -> tuple[int, int, int, int]:
    """Bytes that one worker sends in a step of ``rounds`` micro-batches at ZeRO stage 0, 1, 2 and 3.

    A ring sends (N-1)/N of the data per pass: stage 0 sums and spreads gradients; 1 and 2 scatter sums of gradients and gather weights; 3 gathers
    all weights for forward and for backward of each micro-batch, and scatters the gradients of each.
    """
    once = (workers - 1) / workers
    reduced, everything = _GRADIENT * trained * once, _WEIGHT * (trained + frozen) * once
    return (int(2 * reduced), int(2 * reduced), int((rounds + 1) * reduced), int(rounds * (2 * everything + reduced)))


def _step_flops(parts: _Parts, clips: int) -> tuple[float, float]:
    """Operations of forward and of backward."""
    loss: list[Tensor] = []
    forward = _flops(lambda: loss.append(parts(clips)))
    return forward, _flops(loss[0].backward)


def _flops(work: Callable[[], Any]) -> float:
    # The fused attention of CPUs is not known to the counter; plain attention multiplies the same matrices.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return float(counter.get_total_flops())


def _kept_bytes(parts: _Parts, clips: int) -> int:
    """Bytes that forward keeps for backward under bf16 autocast, which casts weights and keeps the casts as well."""
    with _counting(parts) as total, torch.autocast("cpu", torch.bfloat16):
        parts(clips)
    return total[0]


def _product_bytes(parts: _Parts, clips: int) -> int:
    """Bytes of what attention and products with weights give in the generator: autograd does not see that checkpoints keep them."""
    products = _Products()
    with products, torch.autocast("cpu", torch.bfloat16):
        parts.world(*parts.latents(clips), None)
    return products.bytes


class _Products(TorchDispatchMode):
    """Adds up what `PRODUCTS` give."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0

    def __torch_dispatch__(self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if operation in PRODUCTS:
            self.bytes += sum(tensor.nbytes for tensor in tree_leaves(out) if isinstance(tensor, Tensor))
        return out


@contextmanager
def _checkpointed(family: Sequence[_Parts]) -> Iterator[None]:
    """Generators whose blocks keep their inputs alone."""
    for parts in family:
        checkpoint_blocks(parts.world, "inputs")
    yield
    for parts in family:
        for block in parts.world.repeated_blocks():
            del block.forward


@contextmanager
def _counting(parts: nn.Module) -> Iterator[list[int]]:
    """Adds up the bytes of all tensors that autograd keeps, each once, but for the weights themselves."""
    seen = {p.untyped_storage()._cdata for p in parts.parameters()}
    held: list[Any] = []
    total = [0]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            held.append(storage)  # or its number would be given out again
            total[0] += storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def _encoder_flops(config: RunConfig) -> float:
    """Of encoding one clip, by the published autoencoder's sizes."""
    if config.autoencoder.kind == "pixels":
        return 0.0
    from cola_dist.models.autoencoders import full_size_encoder

    encode = full_size_encoder(config.autoencoder)
    side = config.data.resolution
    with torch.no_grad():
        return _flops(lambda: encode(torch.zeros(1, 3, config.data.frames, side, side)))
