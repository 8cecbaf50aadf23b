"""One phase on stage: a method with the right weights inside an engine, and the way back into a checkpoint.

A phase change and a resume are the same thing: a new engine is built from the newest checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.data.order import Order
from cola_dist.errors import UserError
from cola_dist.methods import Method, Phase, Place, build_method
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter, weights_hash
from cola_dist.train.engine import MOMENTS, Engine, Fragment
from cola_dist.train.hardware import check_memory, computes_bf16, memory_bytes
from cola_dist.train.shelf import Manifest, Position

_AVERAGED_ROLE = "world"


class Stage:
    """Builds the engine of each phase in turn and keeps what lives beside it: the averaged weights and the references to frozen roles."""

    def __init__(self, config: RunConfig, device: torch.device, order: Order, measured: Mapping[str, Tensor]) -> None:
        """``measured`` are buffers, by name, that come from the data where no checkpoint has them yet."""
        self.config, self.device, self._order, self._measured = config, device, order, measured
        self._bf16 = computes_bf16(config.train.precision, device)
        self._place = Place(device, together=True)
        self.autoencoder = build_autoencoder(config.autoencoder, self._bf16, self._place)
        """Frozen, so one for all phases."""
        self._engine: Engine | None = None
        self._copy: Method | None = None
        self._ema: dict[str, Tensor] = {}
        self._resting: list[Fragment] = []
        self._rested_steps: dict[str, int] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def engine(self) -> Engine:
        """The engine of the phase that is open."""
        assert self._engine is not None, "no phase is open"
        return self._engine

    def open(self, phase: Phase, checkpoint: Checkpoint | None) -> Engine:
        """Build the phase's engine from a checkpoint, or from the start if there is none. Raises ``UserError`` if it does not fit."""
        method = self._build()
        self._shapes = {name: tuple(p.shape) for name, p in method.named_parameters()}
        if checkpoint is not None:
            check_fit(checkpoint.manifest, self.config, method, self._order_hash(checkpoint.position.step))
            for role in method.roles():
                load_tensors(method, checkpoint.weights(role))
            load_tensors(method, checkpoint.buffers.items())
        trained = sum(p.numel() for role in phase.trains for _, p in method.role_parameters(role))
        frozen = sum(p.numel() for p in method.parameters()) - trained
        check_memory(self.config.train, phase.name, trained, frozen, memory_bytes(self.device))
        engine = Engine(method, phase, self.config.optim, self.config.train, self.device)
        if checkpoint is not None:
            self._load_moments(engine, checkpoint)
            self._rest(method, phase, checkpoint)
        self._engine = engine
        self._start_average(checkpoint)
        return engine

    def close(self) -> None:
        """Free the engine."""
        self.engine.close()
        self._engine, self._copy, self._ema, self._resting = None, None, {}, []

    def plain_method(self) -> Method:
        """The method with whole, current weights on this rank, outside DeepSpeed's hooks. Collective at ZeRO stage 3."""
        if self.config.train.zero_stage < 3:
            return self.engine.method
        if self._copy is None:
            self._copy = self._build().to(self.device)
        for role in self.engine.method.roles():
            load_tensors(self._copy, self.engine.full_weights(role))
        load_tensors(self._copy, self.engine.method.named_buffers())
        return self._copy

    def hashes(self) -> dict[str, str]:
        """Hash of each role's current weights. Collective at ZeRO stage 3."""
        return {role: weights_hash(self.engine.full_weights(role)) for role in self.engine.method.roles()}

    def after_step(self, applied: bool) -> None:
        """Move the averaged weights of the generator towards the current ones."""
        if applied and self._ema:
            for fragment in self.engine.fragments:
                if fragment.name in self._ema:
                    self._ema[fragment.name].lerp_(fragment.weight, 1 - self.config.optim.ema_decay)

    def save(self, writer: CheckpointWriter, step: int, phase: Phase, record: Mapping[str, Any]) -> str:
        """Start writing a checkpoint. Roles that never trained are saved as a reference and the hash of their weights."""
        method = self.engine.method
        frozen = {
            role: {
                "uri": (self.config.world.pretrained if role == "world" else self.config.adapt.start) or f"seed {self.config.train.seed}",
                "sha256": weights_hash(self.engine.full_weights(role)),
            }
            for role in method.roles()
            if role not in phase.trains and role not in self._rested_steps
        }
        adam_steps = self._rested_steps | self.engine.adam_steps()
        position = Position(step, phase.name, self.config.recipe, self._order_hash(step), adam_steps, frozen, record)
        return writer.save(position, [*self.engine.fragments, *self._resting], dict(method.named_buffers()), self._ema, self._shapes)

    def _build(self) -> Method:
        method = build_method(self.config, self._bf16, self.autoencoder, self._place)
        load_tensors(method, self._measured.items())
        return method

    def _order_hash(self, step: int) -> str:
        """Identity of the clips before ``step``: what comes after may still be changed."""
        return self._order.hash_until(step * self.config.optim.global_batch)

    def _load_moments(self, engine: Engine, checkpoint: Checkpoint) -> None:
        saved = set(checkpoint.position.adam_steps)
        for fragment in engine.fragments:
            if fragment.role in saved:
                for kind in MOMENTS:
                    getattr(fragment, kind).copy_(checkpoint.read(kind, fragment.name, fragment.start, fragment.weight.numel()))
        engine.set_adam_steps(checkpoint.position.adam_steps)

    def _rest(self, method: Method, phase: Phase, checkpoint: Checkpoint) -> None:
        """Keep, of roles that trained before and are frozen now, this rank's share as the checkpoint has it: the next ones hold it too."""
        adam_steps = checkpoint.position.adam_steps
        self._rested_steps = {role: steps for role, steps in adam_steps.items() if role not in phase.trains}
        self._resting = []
        rank, world = dist.get_rank(), dist.get_world_size()
        for role in self._rested_steps:
            for name, _ in method.role_parameters(role):
                shape = self._shapes[name]
                size = math.prod(shape)
                start, stop = size * rank // world, size * (rank + 1) // world
                if start < stop:
                    parts = (checkpoint.read(kind, name, start, stop - start) for kind in ("weight", *MOMENTS))
                    self._resting.append(Fragment(role, name, start, shape, True, *parts))

    def _start_average(self, checkpoint: Checkpoint | None) -> None:
        if self.config.optim.ema_decay == 0:
            return
        for fragment in (*self.engine.fragments, *self._resting):
            if fragment.role == _AVERAGED_ROLE:
                # Averages are kept from the first phase on in which the generator trains.
                saved = checkpoint is not None and checkpoint.has("ema", fragment.name)
                part = (fragment.name, fragment.start, fragment.weight.numel())
                self._ema[fragment.name] = (
                    checkpoint.read("ema", *part).to(self.device) if checkpoint and saved else fragment.weight.clone()
                )


def check_fit(checkpoint: Manifest, config: RunConfig, method: Method, order_hash: str) -> None:
    """Raises ``UserError`` if a checkpoint cannot be continued by a freshly built ``method`` on the clips that ``order_hash`` stands for."""
    where = f"checkpoint {checkpoint.uri}"
    if checkpoint.position.recipe != config.recipe:
        raise UserError(f"{where} is of recipe {checkpoint.position.recipe!r}, not {config.recipe!r}: resume it with its own recipe")
    if checkpoint.position.order_hash != order_hash:
        raise UserError(
            f"{where} was trained on another sequence of clips: restore the shards and data settings of that run, or start a new one"
        )
    shapes = {name: tuple(p.shape) for name, p in method.named_parameters()}
    for name, shape in checkpoint.shapes.items():
        if shapes.get(name) != shape:
            raise UserError(
                f"{where} has {name} of shape {shape}, this model {shapes.get(name, 'none')}: resume it with its own model settings"
            )
    for role, reference in checkpoint.position.frozen.items():
        weights = sorted(method.role_parameters(role))
        # Weights that are nowhere yet are compared where they are loaded.
        if not any(tensor.is_meta for _, tensor in weights) and weights_hash(weights) != reference["sha256"]:
            raise UserError(f"{where} refers to the frozen {role} model {reference['uri']}, whose weights have changed: restore that model")


def load_tensors(method: Method, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Copy named parameters or buffers into a method that DeepSpeed has not taken over."""
    own = dict(method.named_parameters()) | dict(method.named_buffers())
    with torch.no_grad():
        for name, tensor in tensors:
            own[name].copy_(tensor)
