"""Where workers and driver meet: progress, notes and the reason for failing one way, the wish to stop the other."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any

import ray

_LONGEST_WAIT_S = 30.0


class Board:
    """The state behind the actor; see ``create_board``. Its methods run on one event loop, so a waiting one costs nothing."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._step = 0
        self._groups = 0
        self._stop = False
        self._saves = 0
        self._workers = 0
        self._user_error = self._broken = ""
        self._notes: list[str] = []
        self._moved = asyncio.Event()

    async def begin(self) -> int:
        """Rank 0 of a worker group begins; returns how many groups there were before it."""
        self._groups += 1
        return self._groups - 1

    async def show(self, progress: Mapping[str, Any]) -> tuple[bool, int]:
        """Rank 0 posts progress and learns whether to stop, and how often a checkpoint has been asked for."""
        self._progress = dict(progress)
        return self._stop, self._saves

    async def progress(self) -> dict[str, Any]:
        """The newest progress."""
        return self._progress

    async def advance(self, step: int) -> None:
        """Rank 0 has come to ``step``."""
        self._step = step
        self._moved.set()
        self._moved = asyncio.Event()

    async def reached(self, step: int) -> None:
        """Return once training has come to ``step``, or after a while: this paces readers, and must never be what training waits for."""
        deadline = time.monotonic() + _LONGEST_WAIT_S
        while self._step < step and time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._moved.wait(), deadline - time.monotonic())

    async def note(self, line: str) -> None:
        """Something that the user should know and that stops nothing."""
        self._notes.append(line)

    async def notes(self) -> list[str]:
        """All notes so far."""
        return self._notes

    async def ask_to_stop(self) -> None:
        """The driver was interrupted."""
        self._stop = True

    async def ask_to_save(self) -> None:
        """A node is about to go, or the group to change its size."""
        self._saves += 1

    async def resize(self, workers: int) -> None:
        """The next group has so many workers."""
        self._workers = workers

    async def workers(self) -> int:
        """How many the newest group has; 0 where that is fixed."""
        return self._workers

    async def refuse(self, reason: str) -> None:
        """A worker found something that only the user can mend; the first reason stays."""
        self._user_error = self._user_error or reason

    async def user_error(self) -> str:
        """Why a worker refused to go on; empty while none did."""
        return self._user_error

    async def give_up(self, reason: str) -> None:
        """Worker groups broke down, and there will be no other."""
        self._broken = reason

    async def broken(self) -> str:
        """Why the run was given up; empty while it was not."""
        return self._broken


def create_board(workers: int, name: str = "") -> Any:
    """Start the board as an actor that needs no CPU and outlives worker groups, under a name if one is given. Returns its handle."""
    named = {"name": name} if name else {}
    return ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1000 + 10 * workers, **named)(Board).remote()
