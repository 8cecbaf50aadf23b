"""Rollout videos as a page can hold them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import av
import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.evaluation.films import last_frame
from cola_dist.report.blocks import Block, Text, Video, Videos
from cola_dist.report.words import listing

BUDGET_BYTES = 10 * 1024**2
"""Of the videos of a study's page, as base64, with their posters: with those below the page stays below 15 MB."""
JUDGED_BYTES = 3 * 1024**2
"""Of the videos of evaluations, adaptations and plans."""
_POSTER_QUALITY = 70


@dataclass(frozen=True)
class Film:
    """A video and its last frame."""

    source: str
    """Data URI of the MP4."""
    poster: str
    """Data URI of the last frame as JPEG."""
    still: NDArray[np.uint8]
    """The last frame, ``[H, W, 3]``."""

    @property
    def bytes_in_page(self) -> int:
        """What it adds to the page."""
        return len(self.source) + len(self.poster)


class Shelf:
    """Videos of a page, as long as there is room for them."""

    def __init__(self, room: int) -> None:
        self._room = room

    def take(self, videos: Sequence[str]) -> Film | str:
        """The newest of a run's videos, or in words why there is none to show."""
        if not videos:
            return "its run has no video"
        try:
            if storage.size(videos[-1]) > self._room:
                return "the page would be too large"
            data = storage.read_bytes(videos[-1])
            still = last_frame(data)
        except (OSError, ValueError, av.FFmpegError, IndexError) as error:
            return f"its video cannot be read: {error}"
        picture = io.BytesIO()
        imsave(picture, still, format="jpg", pil_kwargs={"quality": _POSTER_QUALITY})
        film = Film(_data_uri("video/mp4", data), _data_uri("image/jpeg", picture.getvalue()), still)
        if film.bytes_in_page > self._room:
            return "the page would be too large"
        self._room -= film.bytes_in_page
        return film

    def videos(self, title: str, places: Mapping[str, tuple[str, str]]) -> list[Block]:
        """The videos at ``places`` (title to path or URI, and what is to be seen), and a line for those that are left out."""
        shown, missing = [], []
        for name, (place, alt) in places.items():
            film = self.take([place])
            if isinstance(film, str):
                missing.append(f"{name} ({film})")
                continue
            shown.append(Video(name, film.source, film.poster, alt))
        blocks: list[Block] = [Videos(title, shown)] if shown else []
        return blocks + ([Text(f"Left out: {listing(missing)}.")] if missing else [])


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
