"""What a step costs on this machine's accelerator (or CPU): LAM, generator, warm-up and joint step, against the same model written plainly.

    python tests/bench/bench_step.py [--recipe opensora] [--clips 4] [--steps 10] [--rounds 3] [--no-compile] [--checkpointing]
        [--section.field VALUE ...]

Weights are random, so no checkpoint is needed; latents are given, and the autoencoder is timed by itself at its published size. ``fast`` is how
this project trains: fused attention, blocks compiled (on an accelerator), fused AdamW, activation checkpointing as the recipe says. ``plain`` is the
same model and optimizer with attention written out, nothing compiled, nothing fused, nothing checkpointed; where it runs out of memory, it says so.
Both in alternation, medians over rounds. Without a GPU, give a small size, for instance ``--recipe tiny``. ``--checkpointing`` compares instead the
fast way with blocks that keep everything for backward (``off``), ``inputs`` or ``products``. ``cpu_seconds`` are of this process, all threads: where
others use the CPU as well they are the steadier figure.

MFU = operations of forward and backward as `cola_dist.train.estimate` counts them, without what checkpointing computes again, per second, over the
accelerator's dense bf16 peak. Tokens are the generator's: latent frames times places. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from cola_dist.config import AUTOENCODERS, RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.models.autoencoder import PixelAutoencoder, to_pixels
from cola_dist.models.autoencoders import full_size_encoder
from cola_dist.settings import apply_overrides, base_of
from cola_dist.train.estimate import ACCELERATORS, estimate

PEAKS = {"H200": "h200", "H100": "h100", "A100": "a100", "4090": "rtx4090"}
"""Parts of a device's name to the accelerator whose peak it has."""


def clips_of(config: RunConfig, count: int, device: torch.device) -> Clips:
    """Noise in the shape of clips, with noise for latents."""
    data, latents = config.data, AUTOENCODERS[config.autoencoder.kind]
    side = data.resolution // latents.shrinks
    frames = 1 + (data.frames - 1) // latents.stride
    video = torch.randint(0, 256, (count, data.frames, 3, data.resolution, data.resolution), dtype=torch.uint8)
    given = torch.randn(count, frames, latents.channels, side, side)
    return Clips(video, torch.arange(count), torch.zeros(count, dtype=torch.int64), given).to(device)


def ways(config: RunConfig, checkpointing: bool) -> dict[str, RunConfig]:
    """What is compared, by name; ``plain`` is also without fused kernels."""
    train = config.train
    if not checkpointing:
        return {"fast": config, "plain": replace(config, train=replace(train, compile=False, activation_checkpointing=False))}
    on = replace(train, activation_checkpointing=True)
    choices = {
        "off": replace(train, activation_checkpointing=False),
        "inputs": replace(on, checkpointing_keeps="inputs"),
        "products": replace(on, checkpointing_keeps="products"),
    }
    return {name: replace(config, train=choice) for name, choice in choices.items()}


def works(config: RunConfig, count: int, device: torch.device, fast: bool) -> dict[str, Callable[[], None]]:
    """What is timed, by name."""
    on_gpu = device.type == "cuda"
    # Latents are given: of the autoencoder only their shape is needed.
    autoencoder = PixelAutoencoder()
    autoencoder.shape = AUTOENCODERS[config.autoencoder.kind]
    built = replace(config, world=replace(config.world, pretrained=None))
    method: Any = build_method(built, on_gpu, autoencoder).to(device)
    clips = clips_of(config, count, device)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-5, fused=fast and on_gpu)

    def step(phase: Any) -> Callable[[], None]:
        def once() -> None:
            method.set_phase(phase)
            method(clips, 1).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        return once

    def lam() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            method.lam.infer(to_pixels(clips.video))[0].float().square().mean().backward()
        optimizer.zero_grad(set_to_none=True)

    def generator() -> None:
        tau = torch.full(clips.latents.shape[:2], 0.5, device=device)  # type: ignore[union-attr]
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            method.world(clips.latents, tau, None)

    return {phase.name: step(phase) for phase in phases(config)} | {"lam": lam, "generator forward": generator}


def seconds(work: Callable[[], None], steps: int, device: torch.device) -> tuple[float, float]:
    """Of one call: of the clock, and of this process's processors."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began, spent = time.perf_counter(), time.process_time()
    for _ in range(steps):
        work()
    wait()
    return (time.perf_counter() - began) / steps, (time.process_time() - spent) / steps


def measure(config: RunConfig, asked: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Any]]:
    """Seconds and peak memory of everything, every way."""
    found: dict[str, dict[str, list[float]]] = {}
    compared = ways(config, asked.checkpointing)
    for round_ in range(asked.rounds):
        for way in compared if round_ % 2 == 0 else reversed(compared):
            with nullcontext() if way != "plain" else sdpa_kernel(SDPBackend.MATH):
                try:
                    for name, work in works(compared[way], asked.clips, device, way != "plain").items():
                        work()  # compiles, fills caches
                        if device.type == "cuda":
                            torch.cuda.reset_peak_memory_stats()
                        entry = found.setdefault(f"{name}, {way}", {"seconds": [], "cpu_seconds": [], "peak_bytes": []})
                        clock, processors = seconds(work, asked.steps, device)
                        entry["seconds"].append(clock)
                        entry["cpu_seconds"].append(processors)
                        entry["peak_bytes"].append(torch.cuda.max_memory_allocated() if device.type == "cuda" else 0)
                except torch.cuda.OutOfMemoryError:
                    found.setdefault(f"out of memory, {way}", {"seconds": [], "cpu_seconds": [], "peak_bytes": []})
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: {key: statistics.median(values) if values else None for key, values in entry.items()} for name, entry in found.items()}


def autoencoder_seconds(config: RunConfig, asked: argparse.Namespace, device: torch.device) -> float:
    """Of encoding the clips with the autoencoder at its published size, random weights."""
    if config.autoencoder.kind == "pixels":
        return 0.0
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        encode = full_size_encoder(config.autoencoder)
        torch.set_default_dtype(before)
    side = config.data.resolution
    video = torch.zeros(1, 3, config.data.frames, side, side, device=device, dtype=dtype)

    def work() -> None:
        with torch.no_grad():
            for _ in range(asked.clips):
                encode(video)

    work()
    return seconds(work, max(1, asked.steps // 2), device)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="opensora")
    parser.add_argument("--clips", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    asked, options = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = apply_overrides(base_of(asked.recipe), options)
    compiles = device.type == "cuda" and not asked.no_compile
    config = replace(
        config,
        train=replace(config.train, compile=compiles, workers=1),
        optim=replace(config.optim, global_batch=asked.clips, micro_batch=0),
    )
    plan = estimate(replace(config, train=replace(config.train, activation_checkpointing=False)))
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = next((ACCELERATORS[known].flops for part, known in PEAKS.items() if part in name), 0.0)
    result: dict[str, Any] = {"bench": "step", "recipe": asked.recipe, "device": name, "clips": asked.clips, "compiled": compiles}
    result |= {"autoencoder_seconds": autoencoder_seconds(config, asked, device)}
    found = measure(config, asked, device)
    places = (config.data.resolution // AUTOENCODERS[config.autoencoder.kind].shrinks // config.world.patch) ** 2
    tokens = asked.clips * (1 + (config.data.frames - 1) // AUTOENCODERS[config.autoencoder.kind].stride) * places
    for key, entry in found.items():
        result[key] = entry
        flops = {phase.name: phase.flops["forward"] + phase.flops["backward"] for phase in plan.phases}.get(key.partition(",")[0])
        if flops and entry["seconds"]:
            entry |= {"tokens_per_s": tokens / entry["seconds"], "mfu": flops / entry["seconds"] / peak if peak else None}
    times = {key: entry["seconds"] for key, entry in found.items() if entry["seconds"]}
    for phase in plan.phases:
        if f"{phase.name}, plain" in times:
            result[f"{phase.name}, plain over fast"] = times[f"{phase.name}, plain"] / times[f"{phase.name}, fast"]
    if {"warmup, fast", "joint, fast"} <= times.keys():
        result["warmup over joint"] = times["warmup, fast"] / times["joint, fast"]
        result["lam's share of joint"] = times["lam, fast"] / times["joint, fast"]
        result["autoencoder's share of joint"] = result["autoencoder_seconds"] / (result["autoencoder_seconds"] + times["joint, fast"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
