"""Where workers and driver meet: progress one way, the wish to stop and the reason for failing the other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray


class Board:
    """The state behind the actor; see ``create_board``."""

    def __init__(self) -> None:
        self._progress: dict[str, Any] = {}
        self._stop = False
        self._user_error = ""

    def show(self, progress: Mapping[str, Any]) -> bool:
        """Rank 0 posts progress and learns whether to stop."""
        self._progress = dict(progress)
        return self._stop

    def progress(self) -> dict[str, Any]:
        """The newest progress."""
        return self._progress

    def ask_to_stop(self) -> None:
        """The driver was interrupted."""
        self._stop = True

    def refuse(self, reason: str) -> None:
        """A worker found something that only the user can mend; the first reason stays."""
        self._user_error = self._user_error or reason

    def user_error(self) -> str:
        """Why a worker refused to go on; empty while none did."""
        return self._user_error


def create_board() -> Any:
    """Start the board as an actor that needs no CPU. Returns its handle."""
    return ray.remote(num_cpus=0, max_restarts=-1)(Board).remote()
