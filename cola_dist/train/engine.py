"""The DeepSpeed engine: one method, one loss, one optimizer, any ZeRO stage. The only file that knows DeepSpeed.

DeepSpeed always sees fp32 parameters; a method that computes in bf16 casts inside its forward. So the weights that a step updates are the
master weights, the quantiser is exact, and a checkpoint holds one copy of each number.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from cola_dist.config import OptimConfig, TrainConfig
from cola_dist.methods.base import Clips, Method, StepOutput
from cola_dist.methods.schedule import Phase

_BUCKET = 50_000_000
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """The part of one parameter and its Adam moments that this rank holds: live 1-D fp32 views of equal length.

    ``start`` is the first element's place in the flattened parameter of shape ``shape``. ``owned`` is false for replicas that another
    rank writes to checkpoints.
    """

    role: str
    name: str
    start: int
    shape: tuple[int, ...]
    owned: bool
    weight: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


@dataclass(frozen=True)
class StepResult:
    """One optimizer step on this rank. ``applied`` is false where a non-finite loss or gradient, on any rank, left everything as it was."""

    metrics: dict[str, Tensor]
    grad_norm: float
    applied: bool
    finite: list[bool]
    """Of each micro-batch whether its loss was; empty for a step that was applied, which nobody need ask."""


class _GuardedAdamW(torch.optim.AdamW):
    """AdamW for ZeRO stage 0, where DeepSpeed does not look at the gradients: a non-finite one leaves everything as it is."""

    overflow = False

    def step(self, closure: Any = None) -> Any:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        # One question to the device, not one per weight.
        self.overflow = not bool(torch.stack([torch.isfinite(g).all() for g in grads]).all())
        return None if self.overflow else super().step(closure)


def _deepspeed() -> Any:
    """The library, loaded where an engine is built: it takes seconds, and the driver builds none.

    On CPU it is kept from compiling its shared-memory collectives. They serve inference, need a C++ compiler, and cost about a minute at the
    first start. DeepSpeed probes for compatible ops lazily and keeps the table in its module, so an empty table answers "none" to each question.
    """
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    import deepspeed.ops

    if not torch.cuda.is_available():
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})
    return deepspeed


class Engine:
    """A method inside DeepSpeed for the length of one phase.

    DeepSpeed fixes the trainable set when it is built (its issues 1767 and 5639), so a phase change builds a new engine. Frozen roles get
    neither optimizer state nor gradient buffers.
    """

    def __init__(self, method: Method, phase: Phase, optim: OptimConfig, train: TrainConfig, device: torch.device) -> None:
        """Wrap ``method`` (full weights, any device) for ``phase``. Needs an initialised process group of all workers."""
        os.environ.setdefault("LOCAL_RANK", "0")
        library = _deepspeed()
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.method = method.to(device)
        self.phase = phase
        self.device = device
        self.stage = train.zero_stage
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._shapes = {name: tuple(p.shape) for name, p in method.named_parameters()}
        self._names = {role: [name for name, _ in method.role_parameters(role)] for role in phase.trains}
        method.set_phase(phase)
        share = optim.global_batch // self.world
        micro = optim.micro_batch or share
        trainable = sum(p.numel() for p in method.parameters() if p.requires_grad)
        self._adam: torch.optim.AdamW = (_GuardedAdamW if self.stage == 0 else torch.optim.AdamW)(
            [{"params": [p for _, p in method.role_parameters(role)], "role": role} for role in phase.trains],
            lr=0.0,
            betas=(optim.beta1, optim.beta2),
            weight_decay=optim.weight_decay,
            fused=device.type == "cuda",
        )
        self._deepspeed, self._optimizer, _, _ = library.initialize(
            model=method,
            optimizer=self._adam,
            config=_deepspeed_config(optim, train, micro, share // micro, trainable, device),
            dist_init_required=False,
        )
        self.micro_batch = micro
        self._create_moments()
        self.fragments = list(self._find_fragments())
        for group in distributed_c10d._world.pg_map:
            # DeepSpeed makes groups of its own, and gives them torch's default.
            distributed_c10d._set_pg_timeout(timedelta(seconds=train.collective_timeout_s), group)

    def step(self, batches: Sequence[Clips], step: int, lr: Mapping[str, float]) -> StepResult:
        """Forward, backward and one optimizer step over this rank's micro-batches (each ``uint8 [b, T, 3, H, W]``)."""
        for group in self._adam.param_groups:
            group["lr"] = lr[group["role"]]
        metrics: dict[str, Tensor] = {}
        norm: Any = 0.0
        # A forward pass writes them too: codes are placed on what it sees.
        buffers = [(buffer, buffer.clone()) for buffer in self.method.buffers()]
        finite = []
        for clips in batches:
            output: StepOutput = self._deepspeed(clips.to(self.device), step)
            # A non-finite loss becomes non-finite in every gradient, so that all ranks see it in the norm and none moves.
            finite.append(torch.isfinite(output.loss.detach()))
            self._deepspeed.backward(output.loss * torch.where(finite[-1], 1.0, torch.nan))
            norm = _norm(self.method) if self.stage == 0 else norm
            self._deepspeed.step()
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, torch.zeros((), device=self.device)) + value.detach() / len(batches)
        norm = norm if self.stage == 0 else self._deepspeed.get_global_grad_norm()
        if not self._optimizer.overflow:
            return StepResult(metrics, float(norm), True, [])
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        return StepResult(metrics, float(norm), False, [bool(one) for one in finite])

    def close(self) -> None:
        """Free DeepSpeed's buffers and hooks. The method must not be used afterwards."""
        self.fragments = []
        self._deepspeed.destroy()

    def adam_steps(self) -> dict[str, int]:
        """Steps that Adam has taken, by role."""
        return {role: int(self._adam.state[flat]["step"]) for flat, role in self._flat_parameters()}

    def set_adam_steps(self, steps: Mapping[str, int]) -> None:
        """Set the step counts that Adam's bias correction uses, by role."""
        for flat, role in self._flat_parameters():
            self._adam.state[flat]["step"].fill_(float(steps.get(role, 0)))

    def full_weights(self, role: str) -> Iterator[tuple[str, Tensor]]:
        """Every parameter of a role by name, whole, on the CPU, in fp32; one at a time, in order of names. Collective at ZeRO stage 3."""
        for name, parameter in sorted(self.method.role_parameters(role)):
            with _deepspeed().zero.GatheredParameters([parameter], enabled=self.stage == 3):
                whole = parameter.detach().to("cpu", torch.float32, copy=True)
            yield name, whole

    def _flat_parameters(self) -> Iterator[tuple[nn.Parameter, str]]:
        """What Adam's state is keyed by: flat partitions under ZeRO, the parameters themselves at stage 0; each with its role."""
        if self.stage == 3:
            for sub_group, flat in enumerate(self._optimizer.fp32_partitioned_groups_flat):
                yield flat, self._adam.param_groups[self._optimizer.sub_group_to_group_id[sub_group]]["role"]
            return
        for group in self._adam.param_groups:
            for flat in group["params"]:
                yield flat, group["role"]

    def _create_moments(self) -> None:
        """Create Adam's state before its first step, so that a checkpoint can be loaded into it and saved from it at any time."""
        for flat, _ in self._flat_parameters():
            step_device = self.device if self.device.type == "cuda" else torch.device("cpu")
            self._adam.state[flat] = {"step": torch.zeros((), dtype=torch.float32, device=step_device)} | {
                key: torch.zeros_like(flat, memory_format=torch.preserve_format) for key in MOMENTS
            }

    def _find_fragments(self) -> Iterator[Fragment]:
        index = 0
        for role in self.phase.trains:
            for name, parameter in self.method.role_parameters(role):
                index += 1
                located = self._locate(parameter)
                if located is None:
                    continue
                flat, offset, length, start = located
                state = self._adam.state[flat]
                weight, exp_avg, exp_avg_sq = (
                    t.detach().view(-1).narrow(0, offset, length) for t in (flat, state["exp_avg"], state["exp_avg_sq"])
                )
                owned = self.stage > 0 or index % self.world == self.rank
                yield Fragment(role, name, start, self._shapes[name], owned, weight, exp_avg, exp_avg_sq)

    def _locate(self, parameter: Any) -> tuple[nn.Parameter, int, int, int] | None:
        """Where this rank holds ``parameter``: (flat tensor, offset in it, length, offset in the parameter); none = not at all."""
        if self.stage == 0:
            return parameter, 0, parameter.numel(), 0
        if self.stage == 3:
            group, offset, padded = self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]
            start = self.rank * padded
            length = min(padded, parameter.ds_numel - start)
            return None if length <= 0 else (self._optimizer.fp32_partitioned_groups_flat[group], offset, length, start)
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        return flat, mapping.hp_fragment_address.start, mapping.hp_fragment_address.numel, mapping.lp_fragment_address.start


def _norm(method: nn.Module) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in method.parameters() if p.grad is not None])


def _deepspeed_config(
    optim: OptimConfig, train: TrainConfig, micro: int, accumulation: int, trainable: int, device: torch.device
) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optim.clip_norm,
        "zero_optimization": {
            "stage": train.zero_stage,
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            # DeepSpeed allocates the bucket anew in each step: larger than the model costs page faults and nothing else.
            "reduce_bucket_size": min(trainable, _BUCKET),
            "allgather_bucket_size": min(trainable, _BUCKET),
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1_000_000_000,
    }
