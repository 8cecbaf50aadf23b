"""What keeping the context's keys and values saves in rollouts: the same rollouts with and without, in alternation, medians over rounds.

    python tests/bench/bench_rollout.py [--recipe tiny] [--clips 16] [--frames 17] [--context 0] [--rounds 5] [--section.field VALUE ...]

Weights are random and latents are noise of the recipe's shape; decoding is left out. ``--context``: clean latent frames of a window, 0 = half of it.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from torch import Tensor

from cola_dist.config import AUTOENCODERS
from cola_dist.evaluation.imagine import imagine, keyed_noise, sampling_of
from cola_dist.methods import build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.autoencoder import PixelAutoencoder
from cola_dist.settings import apply_overrides, base_of


class NotDecoded(PixelAutoencoder):
    """Latents as they are, in the place of an autoencoder whose time is left out."""

    def encode(self, video: Tensor) -> Tensor:
        return self._latents

    def decode(self, latents: Tensor) -> Tensor:
        self._latents = latents[:, -self.context :]
        return latents

    context = 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--frames", type=int, default=17, help="latent frames of a rollout")
    parser.add_argument("--context", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    asked, options = parser.parse_known_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = apply_overrides(base_of(asked.recipe), options)
    config = replace(config, world=replace(config.world, pretrained=None))
    shape = AUTOENCODERS[config.autoencoder.kind]
    sampling = sampling_of(config, context=asked.context)
    autoencoder = NotDecoded()
    autoencoder.shape, autoencoder.context = shape, sampling.context
    method = build_method(config, device.type == "cuda", autoencoder).to(device).eval()
    assert isinstance(method, CoTrain)
    with torch.no_grad():
        # Gates and output start at zero: nothing that attention does would show.
        for parameter in method.parameters():
            parameter += 0.02 * torch.randn_like(parameter)

    side = config.data.resolution // shape.shrinks
    frame = (shape.channels, side, side)
    context = torch.randn(asked.clips, 1, *frame, device=device)
    tokens = (config.lam.tokens, config.lam.bottleneck.dim)
    actions = torch.randn(asked.clips, (asked.frames - 1) * shape.stride, *tokens, device=device)
    noise = keyed_noise(0, torch.arange(asked.clips), frame, device)

    def timed(cached: bool) -> tuple[float, Tensor]:
        began = time.perf_counter()
        pieces = list(imagine(method, context, actions, noise, replace(sampling, cached=cached)))
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cat([piece.latents for piece in pieces], 1)

    ways = {"cached": True, "plain": False}
    made = {name: timed(cached)[1] for name, cached in ways.items()}
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(asked.rounds):
        for name, cached in ways.items():
            took[name].append(timed(cached)[0])
    frames = asked.clips * (asked.frames - 1)
    result = {
        "recipe": asked.recipe,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "window": sampling.window,
        "context": sampling.context,
        "sampler_steps": sampling.flow.sampler_steps,
        "frames_per_s": {name: round(frames / statistics.median(seconds), 1) for name, seconds in took.items()},
        "speed_up": round(statistics.median(a / b for a, b in zip(took["plain"], took["cached"], strict=True)), 2),
        "largest_difference": float((made["cached"] - made["plain"]).abs().max()),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
