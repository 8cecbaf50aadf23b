"""Which clip stands at which global position: pure arithmetic on (seed, mixture, position).

Positions are grouped in blocks. Each block holds an exact number of clips of each source, shuffled by a key of the block's own. The n-th clip
drawn from a source belongs to epoch ``n // windows`` and to the window that a keyed permutation assigns to ``n % windows``, so an epoch shows
every window once. Nothing is materialised: memory does not grow with the number of positions, and a run resumes from a number.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 4


@dataclass(frozen=True)
class EpisodeSpan:
    """Length of one episode in stored frames, and the step in stored frames that gives the run's frame rate."""

    frames: int
    stride: int


@dataclass(frozen=True)
class Source:
    """One source as the order sees it. ``content`` is the hash of its data, so that changed data is noticed on resume."""

    name: str
    weight: float
    episodes: tuple[EpisodeSpan, ...]
    content: str


@dataclass(frozen=True)
class ClipRef:
    """One clip: ``frames`` frames of an episode from ``start``, every ``stride``-th. ``key`` seeds its augmentation."""

    position: int
    source: int
    epoch: int
    episode: int
    start: int
    stride: int
    key: int


def mix(*values: int) -> int:
    """Hash integers to 64 bits (the finaliser of SplitMix64, chained)."""
    state = 0x9E3779B97F4A7C15
    for value in values:
        state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state


def permute(index: int, size: int, key: int) -> int:
    """A keyed permutation of ``range(size)``: a Feistel network on the next even power of two, walked until it lands inside."""
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for round_ in range(_ROUNDS):
            left, right = right, left ^ (mix(key, round_, right) & low)
        index = left << half | right
        if index < size:
            return index


class Order:
    """The sequence of clips of a run.

    ``frames`` is T. Each source's windows are consecutive spans of ``(T - 1) * stride + 1`` stored frames; a window's start moves by a keyed
    offset that differs between epochs, so that all alignments are seen.
    """

    def __init__(self, sources: Sequence[Source], frames: int, block: int, seed: int) -> None:
        """Raises ``ValueError`` if a source has no episode as long as a clip, or a share too small for the block."""
        self.sources = tuple(sources)
        self.frames, self.block, self.seed = frames, block, seed
        weights = [s.weight for s in sources]
        self._shares = _integer_shares(weights)
        self._denominator = sum(self._shares)
        for source, share in zip(self.sources, self._shares, strict=True):
            if share * block < self._denominator:
                raise ValueError(
                    f"source {source.name!r} has less than one clip per mixture block of {block}: raise data.mixture_block to at least "
                    f"{math.ceil(sum(map(_exact, weights)) / _exact(source.weight))} or the source's weight"
                )
        self._spans = [[(frames - 1) * e.stride + 1 for e in s.episodes] for s in self.sources]
        self._cumulative = [
            list(itertools.accumulate(e.frames // span for e, span in zip(s.episodes, spans, strict=True)))
            for s, spans in zip(self.sources, self._spans, strict=True)
        ]
        for source, cumulative in zip(self.sources, self._cumulative, strict=True):
            if not cumulative or cumulative[-1] == 0:
                raise ValueError(f"source {source.name!r} has no episode of at least {frames} frames at this rate")

    @property
    def hash(self) -> str:
        """Identity of the whole sequence: seed, block, clip length, and of each source its content, share and episodes with their strides."""
        digest = hashlib.sha256(json.dumps([self.seed, self.frames, self.block]).encode())
        for source, share in zip(self.sources, self._shares, strict=True):
            digest.update(json.dumps([source.name, share, source.content, [[e.frames, e.stride] for e in source.episodes]]).encode())
        return digest.hexdigest()

    def windows(self, source: int) -> int:
        """Clips in one epoch of a source."""
        return self._cumulative[source][-1]

    def clip(self, position: int, attempt: int = 0) -> ClipRef:
        """The clip at ``position``. ``attempt`` > 0 names its replacements, which depend on nothing but the position and the attempt."""
        source, nth = self._draw(position)
        windows = self.windows(source)
        epoch, place = divmod(nth, windows)
        if attempt == 0:
            window = permute(place, windows, mix(self.seed, 1, source, epoch))
        else:
            window = mix(self.seed, 2, position, attempt) % windows
        episode = bisect.bisect_right(self._cumulative[source], window)
        within = window - (self._cumulative[source][episode - 1] if episode else 0)
        span, info = self._spans[source][episode], self.sources[source].episodes[episode]
        start = min(within * span + mix(self.seed, 3, source, epoch, window) % span, info.frames - span)
        return ClipRef(position, source, epoch, episode, start, info.stride, mix(self.seed, 4, position))

    def counts(self, block: int) -> tuple[int, ...]:
        """Clips of each source in mixture block number ``block``."""
        return tuple(b - a for a, b in zip(self._before(block), self._before(block + 1), strict=True))

    def _before(self, block: int) -> list[int]:
        """Clips of each source in all earlier blocks: prefix shares, rounded down, differenced; always within one of the exact share."""
        total = block * self.block
        edges = [total * prefix // self._denominator for prefix in itertools.accumulate(self._shares)]
        return [b - a for a, b in itertools.pairwise([0, *edges])]

    def _draw(self, position: int) -> tuple[int, int]:
        block, slot = divmod(position, self.block)
        sources, nth = _assign_slots(mix(self.seed, 0, block), tuple(self._before(block)), self.counts(block))
        return int(sources[slot]), int(nth[slot])


def rank_positions(step: int, global_batch: int, rank: int, world: int) -> range:
    """Positions of one rank in the global batch of ``step``: its contiguous slice of ``[step * B, (step + 1) * B)``."""
    share = global_batch // world
    first = step * global_batch + rank * share
    return range(first, first + share)


def crop_of(key: int, smallest: float) -> tuple[float, float, float]:
    """Random-resized crop from a clip's key: (side as a share of the short side, x and y in [0, 1] of the free room)."""
    scale, x, y = (mix(key, purpose) / (_MASK + 1) for purpose in (11, 12, 13))
    return smallest + (1 - smallest) * scale, x, y


@lru_cache(maxsize=64)
def _assign_slots(key: int, before: tuple[int, ...], counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of a block: its source, and how many clips were drawn from that source before it."""
    sources = np.repeat(np.arange(len(counts)), counts)
    nth = np.concatenate([np.arange(start, start + count) for start, count in zip(before, counts, strict=True)])
    shuffle = np.random.Generator(np.random.Philox(key=key)).permutation(len(sources))
    return sources[shuffle], nth[shuffle]


def _exact(weight: float) -> Fraction:
    """The number as it was written: 0.1 is one tenth."""
    return Fraction(str(weight))


def _integer_shares(weights: Sequence[float]) -> list[int]:
    """Weights as whole numbers in the same proportion (to one millionth of the largest), so that counts are exact at any position."""
    largest = max(map(_exact, weights))
    fractions = [(_exact(w) / largest).limit_denominator(1_000_000) for w in weights]
    # Python's own integers: the common denominator of a few arbitrary weights exceeds 64 bits.
    common = math.lcm(*(f.denominator for f in fractions))
    return [int(f * common) for f in fractions]
