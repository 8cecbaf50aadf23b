"""Where the time of a plan goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

import torch

Part = Literal["encode", "rollout", "objective", "simulator"]
"""encode: context to latents; rollout: what is imagined, decoded; objective: its score; simulator: the real environment's steps."""
PARTS: tuple[Part, ...] = get_args(Part)


class Watch:
    """Seconds by part, added up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """Count what happens inside, on an accelerator until it is done."""
        began = time.perf_counter()
        yield
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
