"""Which clip stands at which global position: pure arithmetic on (seed, mixture, position).

Positions are grouped in blocks. Each block holds an exact number of clips of each source, shuffled by a key of the block's own. The n-th clip
drawn from a source belongs to epoch ``n // windows`` and to the window that a keyed permutation assigns to ``n % windows``, so an epoch shows
every window once. Nothing is materialised: memory does not grow with the number of positions, and a run resumes from a number.

The mixture may change at given positions, where a new stage begins. Its blocks are counted from there; the last block of the stage before is cut
off, and the clip numbers that the cut left undrawn come first in the new stage. So every source goes on with its epochs across stages.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache, reduce

import numpy as np

_MASK = (1 << 64) - 1
_ROUNDS = 4
_SEED_STATE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class EpisodeSpan:
    """Length of one episode in stored frames, and the step in stored frames that gives the run's frame rate."""

    frames: int
    stride: int


@dataclass(frozen=True)
class Source:
    """One source as the order sees it. ``content`` is the hash of its data, so that changed data is noticed on resume.

    ``weight`` is that of the first mixture, 0 for a source that only a later stage has.
    """

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
    return reduce(_mix_in, values, _SEED_STATE)


def permute(index: int, size: int, key: int) -> int:
    """A keyed permutation of ``range(size)``: a Feistel network on the next even power of two, walked until it lands inside."""
    return _walk(index, size, _round_states(key))


class Order:
    """The sequence of clips of a run.

    ``frames`` is T. Each source's windows are consecutive spans of ``(T - 1) * stride + 1`` stored frames; a window's start moves by a keyed
    offset that differs between epochs, so that all alignments are seen.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        frames: int,
        block: int,
        seed: int,
        stages: Mapping[int, Mapping[str, float]] | None = None,
        temperature: float = 0.0,
    ) -> None:
        """``stages`` maps the positions at which the mixture changes to the weights, by the sources' names, that hold from there on.

        With ``temperature`` T above 0 a source's share is in proportion to weight * windows ** (1 / T), in every stage; with 0 to its weight.
        Raises ``ValueError`` if a source has no episode as long as a clip, or a share too small for the block.
        """
        self.sources = tuple(sources)
        self.frames, self.block, self.seed, self.temperature = frames, block, seed, temperature
        self._spans = [[(frames - 1) * e.stride + 1 for e in s.episodes] for s in self.sources]
        self._cumulative = [
            list(itertools.accumulate(e.frames // span for e, span in zip(s.episodes, spans, strict=True)))
            for s, spans in zip(self.sources, self._spans, strict=True)
        ]
        for source, cumulative in zip(self.sources, self._cumulative, strict=True):
            if not cumulative or cumulative[-1] == 0:
                raise ValueError(f"source {source.name!r} has no episode of at least {frames} frames at this rate")
        none = (0,) * len(self.sources)
        shares = self._shares_of([s.weight for s in self.sources], "")
        self._stages = [_Stage(0, mix(seed, 0), block, shares, none, ((),) * len(none))]
        for start, weights in sorted((stages or {}).items()):
            where = f" from position {start} (step * global batch) on"
            shares = self._shares_of([weights.get(s.name, 0.0) for s in self.sources], where)
            self._stages.append(self._stages[-1].followed_by(start, mix(seed, 5, start), shares))
        self._starts = [stage.start for stage in self._stages]
        self._clip_keys = mix(seed, 4)

    def _shares_of(self, weights: Sequence[float], where: str) -> tuple[int, ...]:
        """Whole numbers in the proportion in which the sources are drawn. ``where`` tells an error's reader which stage it is about."""
        exact = [_exact(weight) for weight in weights]
        if self.temperature:
            largest = max(self.windows(i) for i, weight in enumerate(exact) if weight)
            sizes = [Fraction((self.windows(i) / largest) ** (1 / self.temperature)) for i in range(len(exact))]
            exact = [weight * size for weight, size in zip(exact, sizes, strict=True)]
        shares = _integer_shares(exact)
        for source, weight, share in zip(self.sources, exact, shares, strict=True):
            if weight and share * self.block < sum(shares):
                raise ValueError(
                    f"source {source.name!r} has less than one clip per mixture block of {self.block}{where}: raise data.mixture_block to at "
                    f"least {math.ceil(sum(exact) / weight)} or the source's weight"
                )
        return shares

    def hash_until(self, position: int) -> str:
        """Identity of the sequence before ``position``: seed, block, clip length, and of each stage begun by then its start and its sources with
        their contents, shares and episodes. Later stages, and sources that only they have, do not change it.
        """
        return self._hashes[max(0, bisect.bisect_left(self._starts, position) - 1)]

    @cached_property
    def _hashes(self) -> list[str]:
        """Identity of the sequence up to the end of each stage."""
        digest = hashlib.sha256(json.dumps([self.seed, self.frames, self.block]).encode())
        hashes = []
        for stage in self._stages:
            if stage.start:
                digest.update(json.dumps([stage.start]).encode())
            for source, share in zip(self.sources, stage.shares, strict=True):
                if share:
                    episodes = [[e.frames, e.stride] for e in source.episodes]
                    digest.update(json.dumps([source.name, share, source.content, episodes]).encode())
            hashes.append(digest.hexdigest())
        return hashes

    def windows(self, source: int) -> int:
        """Clips in one epoch of a source."""
        return self._cumulative[source][-1]

    def drawn(self, position: int) -> list[int]:
        """Clips of each source at the positions before ``position``; over ``windows``, its epochs so far."""
        stage = self._stages[bisect.bisect_right(self._starts, position) - 1]
        number, slot = divmod(position - stage.start, self.block)
        sources, _ = _assign_slots(stage, number)
        here = np.bincount(sources[:slot], minlength=len(self.sources))
        return [before + int(count) for before, count in zip(stage.before(number), here, strict=True)]

    def clip(self, position: int, attempt: int = 0) -> ClipRef:
        """The clip at ``position``. ``attempt`` > 0 names its replacements, which depend on nothing but the position and the attempt."""
        stage = self._stages[bisect.bisect_right(self._starts, position) - 1]
        number, slot = divmod(position - stage.start, self.block)
        sources, turns = _assign_slots(stage, number)
        source = sources.item(slot)
        cumulative = self._cumulative[source]
        epoch, place = divmod(stage.nth(source, turns.item(slot)), cumulative[-1])
        rounds, offset = _epoch_keys(self.seed, source, epoch)
        if attempt == 0:
            window = _walk(place, cumulative[-1], rounds)
        else:
            window = mix(self.seed, 2, position, attempt) % cumulative[-1]
        episode = bisect.bisect_right(cumulative, window)
        within = window - (cumulative[episode - 1] if episode else 0)
        span, info = self._spans[source][episode], self.sources[source].episodes[episode]
        start = min(within * span + _mix_in(offset, window) % span, info.frames - span)
        return ClipRef(position, source, epoch, episode, start, info.stride, _mix_in(self._clip_keys, position))


@dataclass(frozen=True, eq=False)
class _Stage:
    """The positions from ``start`` on that share one mixture. Compared by identity, so that a cache may find it quickly.

    A stage draws clips of a source by turns, which it counts from ``drawn``. A turn is the number of the clip that is drawn, except for the first
    ``len(owed)`` turns: they take the numbers that the cut of the stage before left undrawn.
    """

    start: int
    key: int
    block: int
    shares: tuple[int, ...]
    drawn: tuple[int, ...]
    """Clips of each source at all earlier positions."""
    owed: tuple[tuple[int, ...], ...]

    def before(self, number: int) -> list[int]:
        """Turns of each source before block ``number``: prefix shares, rounded down, differenced; always within one of the exact share."""
        total, denominator = number * self.block, sum(self.shares)
        edges = [total * prefix // denominator for prefix in itertools.accumulate(self.shares)]
        return [drawn + b - a for drawn, (a, b) in zip(self.drawn, itertools.pairwise([0, *edges]), strict=True)]

    def nth(self, source: int, turn: int) -> int:
        """How many clips of a source come before the one drawn in a turn, counted through its epochs."""
        owed, index = self.owed[source], turn - self.drawn[source]
        return owed[index] if index < len(owed) else turn

    def followed_by(self, start: int, key: int, shares: tuple[int, ...]) -> _Stage:
        """The stage that begins at ``start`` and ends this one."""
        number, cut = divmod(start - self.start, self.block)
        sources, turns = (slots[:cut] for slots in _assign_slots(self, number))
        drawn, owed = [], []
        for source, (first, end) in enumerate(zip(self.before(number), self.before(number + 1), strict=True)):
            gone = set(turns[sources == source].tolist())
            end = max(end, self.drawn[source] + len(self.owed[source]))
            drawn.append(first + len(gone))
            owed.append(tuple(self.nth(source, turn) for turn in range(first, end) if turn not in gone))
        return _Stage(start, key, self.block, shares, tuple(drawn), tuple(owed))


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
def _assign_slots(stage: _Stage, number: int) -> tuple[np.ndarray, np.ndarray]:
    """For each slot of a stage's block: its source, and that source's turn."""
    before, after = stage.before(number), stage.before(number + 1)
    sources = np.repeat(np.arange(len(before)), [end - first for first, end in zip(before, after, strict=True)])
    turns = np.concatenate([np.arange(first, end) for first, end in zip(before, after, strict=True)])
    shuffle = np.random.Generator(np.random.Philox(key=_mix_in(stage.key, number))).permutation(stage.block)
    return sources[shuffle], turns[shuffle]


@lru_cache(maxsize=64)
def _epoch_keys(seed: int, source: int, epoch: int) -> tuple[tuple[int, ...], int]:
    """What the clips of an epoch share: the states of its permutation's rounds, and the state that keys the windows' offsets."""
    return _round_states(mix(seed, 1, source, epoch)), mix(seed, 3, source, epoch)


def _round_states(key: int) -> tuple[int, ...]:
    return tuple(mix(key, round_) for round_ in range(_ROUNDS))


def _walk(index: int, size: int, rounds: tuple[int, ...]) -> int:
    half = max(1, (size - 1).bit_length() + 1 >> 1)
    low = (1 << half) - 1
    while True:
        left, right = index >> half, index & low
        for state in rounds:
            left, right = right, left ^ (_mix_in(state, right) & low)
        index = left << half | right
        if index < size:
            return index


def _mix_in(state: int, value: int) -> int:
    state = (state ^ (value & _MASK)) * 0xBF58476D1CE4E5B9 & _MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
    return state ^ (state >> 31)


def _exact(weight: float) -> Fraction:
    """The number as it was written: 0.1 is one tenth."""
    return Fraction(str(weight))


def _integer_shares(weights: Sequence[Fraction]) -> tuple[int, ...]:
    """Weights as whole numbers in the same proportion (to one millionth of the largest), so that counts are exact at any position."""
    largest = max(weights)
    fractions = [(weight / largest).limit_denominator(1_000_000) for weight in weights]
    # Python's own integers: the common denominator of a few arbitrary weights exceeds 64 bits.
    common = math.lcm(*(f.denominator for f in fractions))
    return tuple(int(f * common) for f in fractions)
