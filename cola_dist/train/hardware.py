"""What the machine offers to one worker."""

from __future__ import annotations

import os
import resource
import time

import torch

from cola_dist.config import TrainConfig
from cola_dist.errors import UserError
from cola_dist.train.estimate import state_bytes


def computes_bf16(precision: str, device: torch.device) -> bool:
    """Whether to cast to bf16: as told, or for ``auto`` where the hardware multiplies matrices in it (emulation is slower than fp32)."""
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def prepare(train: TrainConfig, device: torch.device) -> None:
    """Set threads and determinism of this process. Raises ``UserError`` where a GPU is asked for and there is none."""
    if train.gpus and device.type != "cuda":
        raise UserError("train.gpus is true but this worker sees no GPU: add GPUs to the cluster or set --train.gpus False")
    torch.set_num_threads(max(1, int(train.cpus_per_worker)))
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=device.type == "cuda")
        # Filling each new tensor with NaN finds reads of memory that nobody wrote; it makes nothing more deterministic and costs 4 % of a CPU step.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # the module is a class with properties


def check_memory(train: TrainConfig, phase: str, trained: int, frozen: int, available: int) -> None:
    """Raises ``UserError`` if a worker with ``available`` bytes cannot hold what a phase keeps of so many trained and frozen parameters."""
    needs = state_bytes(trained, frozen, train.workers)
    if needs[train.zero_stage] <= available:
        return
    less = [f"{stage} needs {needs[stage] / 1e9:.1f} GB" for stage in range(train.zero_stage + 1, 4) if needs[stage] <= available]
    remedy = f"set --train.zero-stage ({less[0]})" if less else "give the run more workers (with --train.zero-stage 3)"
    raise UserError(
        f"phase {phase} needs {needs[train.zero_stage] / 1e9:.1f} GB on each of {train.workers} workers for weights, gradients and optimizer of "
        f"{(trained + frozen) / 1e9:.2f} B parameters at ZeRO stage {train.zero_stage}, and this worker has {available / 1e9:.1f} GB: "
        f"{remedy}, or choose a smaller model"
    )


def memory_bytes(device: torch.device) -> int:
    """Memory of a GPU, or this worker's share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: allocated GPU memory since ``reset_peak_memory``, or the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory(device: torch.device) -> None:
    """Start a new peak on a GPU. The operating system keeps one peak per process, so on CPU a later phase includes the earlier ones."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def compute_clock(device: torch.device) -> float:
    """Seconds of which differences are accelerator time: of the wall on a GPU (a step ends by reading its gradient norm), of processors on CPU."""
    return time.perf_counter() if device.type == "cuda" else time.process_time()
