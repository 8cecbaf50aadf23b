"""The order of clips: exact mixture, no repetition, the same at any number of workers, and addressable without end."""

from __future__ import annotations

import hashlib
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cola_dist.data.order import ClipRef, EpisodeSpan, Order, Source, crop_of, permute, rank_positions

FRAMES = 5
# position → (source, epoch, episode, start, stride, key)
GOLDEN = {
    0: (0, 0, 2, 17, 1, 15345556144258036963),
    1: (0, 0, 0, 17, 1, 7995457277576442323),
    2: (0, 0, 2, 7, 1, 15617613830643525193),
    3: (1, 0, 1, 11, 2, 7863545990059629354),
    4: (0, 0, 1, 28, 1, 8091550167074430600),
    5: (0, 0, 0, 33, 1, 9744660050106307276),
    6: (2, 0, 0, 3, 1, 9724307868047668535),
    7: (1, 0, 1, 1, 2, 15240336650245506482),
    8: (2, 0, 0, 7, 1, 8705028393927682315),
    9: (1, 0, 2, 4, 2, 5322410244224584101),
    10: (0, 0, 0, 9, 1, 13517011044668517389),
    11: (2, 0, 1, 1, 1, 6462889614934974374),
    12: (0, 0, 0, 11, 1, 15058117796123981005),
    13: (0, 0, 2, 50, 1, 6953903320703721913),
    14: (1, 0, 2, 29, 2, 14175564569373350672),
    15: (1, 0, 0, 52, 2, 15882867498572351211),
    10**9: (1, 19119240, 0, 30, 2, 10214667606169232683),
    10**12 + 5: (2, 44420368364, 1, 2, 1, 13704062621152002764),
}


def source(name: str, lengths: Sequence[int], weight: float = 1.0, stride: int = 1, content: str = "") -> Source:
    return Source(name, weight, tuple(EpisodeSpan(length, stride) for length in lengths), content or name)


lengths = st.lists(st.integers(1, 60), min_size=1, max_size=6).filter(lambda all_: max(all_) >= (FRAMES - 1) * 3 + 1)
weights = st.lists(st.floats(0.05, 20.0).map(lambda w: round(w, 3)), min_size=1, max_size=5)
whole = st.sampled_from([[1, 1], [3, 7], [0.5, 0.3, 0.2], [1, 2, 3, 4], [0.1, 0.4, 0.5]])
seeds = st.integers(0, 2**63 - 1)


@settings(max_examples=50, deadline=None)
@given(st.one_of(weights, whole), st.integers(1, 20).map(lambda n: 10 * n), seeds, st.one_of(st.integers(0, 50), st.integers(0, 10**9)))
def test_mixture_is_exact_in_every_block(parts: list[float], block: int, seed: int, number: int) -> None:
    assume(all(w * block >= sum(parts) * 1.000001 for w in parts))
    order = Order([source(f"s{i}", [20, 9], w) for i, w in enumerate(parts)], FRAMES, block, seed)
    drawn = Counter(order.clip(number * block + slot).source for slot in range(block))
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in parts) for w in parts]
    for index, share in enumerate(part * block for part in exact):
        assert abs(drawn[index] - share) < 2
        assert drawn[index] == share or any((part * block).denominator > 1 for part in exact), "whole shares are met in every block"


@settings(max_examples=30, deadline=None)
@given(weights, seeds)
@pytest.mark.parametrize("first", [0, 10**9 - 40])
def test_every_source_stays_within_one_clip_of_its_exact_share(first: int, parts: list[float], seed: int) -> None:
    block = 100
    assume(all(w * block > 2 * sum(parts) for w in parts))
    order = Order([source(f"s{i}", [5], w) for i, w in enumerate(parts)], FRAMES, block, seed)
    exact = [Fraction(str(w)) / sum(Fraction(str(w)) for w in parts) for w in parts]
    # With one window to a source, a clip's epoch is the number of clips that its source has given before it.
    given_before: dict[int, int] = {}
    for slot in range(block):
        ref = order.clip(first * block + slot)
        given_before[ref.source] = min(ref.epoch, given_before.get(ref.source, ref.epoch))
    total = dict(given_before)
    for number in range(first, first + 40):
        for index, share in enumerate(exact):
            assert abs(total[index] - share * number * block) <= 1
        for slot in range(block):
            total[order.clip(number * block + slot).source] += 1


def test_weights_need_not_sum_to_one_and_many_arbitrary_ones_stay_exact() -> None:
    parts = [0.123456789, 0.987654321, 0.314159265, 0.271828183, 0.577215665]
    orders = [Order([source(f"s{i}", [5], w * scale) for i, w in enumerate(parts)], FRAMES, 64, 0) for scale in (1, 1000)]
    assert orders[0].hash_until(0) == orders[1].hash_until(0)
    assert [orders[0].clip(p) for p in range(10**12, 10**12 + 64)] == [orders[1].clip(p) for p in range(10**12, 10**12 + 64)]
    count = sum(orders[0].clip(position).source == 0 for position in range(200 * 64))
    assert abs(count - 200 * 64 * parts[0] / sum(parts)) <= 1.2


@settings(max_examples=30, deadline=None)
@given(lengths, st.integers(1, 3), seeds)
def test_an_epoch_shows_every_window_once(all_: list[int], stride: int, seed: int) -> None:
    order = Order([source("one", all_, stride=stride)], FRAMES, 16, seed)
    span = (FRAMES - 1) * stride + 1
    everything = {(episode, window) for episode, frames in enumerate(all_) for window in range(frames // span)}
    assert order.windows(0) == len(everything)
    # A block is shuffled as a whole, so an epoch may begin inside one: this many blocks hold four whole epochs.
    epochs: dict[int, list[ClipRef]] = {}
    for position in range(-(-4 * len(everything) // 16) * 16):
        ref = order.clip(position)
        epochs.setdefault(ref.epoch, []).append(ref)
    for refs in (epochs[epoch] for epoch in range(4)):
        assert len({(ref.episode, ref.start) for ref in refs}) == len(refs) == len(everything)
        assert Counter(ref.episode for ref in refs) == Counter(episode for episode, _ in everything)


@settings(max_examples=30, deadline=None)
@given(lengths, lengths, st.integers(1, 3), seeds, st.integers(0, 10**12))
def test_no_source_repeats_a_window_inside_an_epoch_of_a_mixture(
    first: list[int], second: list[int], stride: int, seed: int, start: int
) -> None:
    order = Order([source("a", first, 0.7, stride), source("b", second, 0.3, stride)], FRAMES, 10, seed)
    refs = [order.clip(position) for position in range(start, start + 300)]
    seen = Counter((ref.source, ref.epoch, ref.episode, ref.start) for ref in refs)
    assert max(seen.values()) == 1
    assert {ref.source for ref in refs} == {0, 1}


@settings(max_examples=50, deadline=None)
@given(lengths, st.integers(1, 3), seeds, st.integers(0, 10**12), st.integers(0, 20))
def test_clips_lie_inside_their_episode(all_: list[int], stride: int, seed: int, position: int, attempt: int) -> None:
    ref = Order([source("one", all_, stride=stride)], FRAMES, 16, seed).clip(position, attempt)
    assert ref.stride == stride
    assert ref.start >= 0
    assert ref.start + (FRAMES - 1) * stride < all_[ref.episode]


def test_starts_move_between_epochs() -> None:
    order = Order([source("one", [100])], FRAMES, 16, 0)
    starts = {epoch: {order.clip(position).start for position in range(epoch * 20, epoch * 20 + 20)} for epoch in range(10)}
    assert len(set().union(*starts.values())) > 80, "every alignment must come up"
    assert starts[0] != starts[1]


@pytest.mark.parametrize("step", [0, 7, 10**9])
def test_any_number_of_workers_sees_the_same_global_batch(step: int) -> None:
    batch = 24
    whole = list(rank_positions(step, batch, 0, 1))
    assert whole == list(range(step * batch, (step + 1) * batch))
    for world in (2, 3, 4, 8):
        shares = [list(rank_positions(step, batch, rank, world)) for rank in range(world)]
        assert {len(share) for share in shares} == {batch // world}
        assert [position for share in shares for position in share] == whole


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 10**12), st.integers(1, 20))
def test_a_replacement_depends_on_position_and_attempt_alone(seed: int, position: int, attempt: int) -> None:
    sources = [source("a", [40, 33, 60], 0.5), source("b", [50, 50], 0.5)]
    order, other = Order(sources, FRAMES, 8, seed), Order(sources, FRAMES, 8, seed)
    before = [other.clip(p) for p in range(position, position + 4)]
    replacement = order.clip(position, attempt)
    assert [order.clip(p) for p in range(position, position + 4)] == before, "no other position may change"
    for earlier in range(attempt):
        other.clip(position, earlier)
    assert other.clip(position, attempt) == replacement
    assert (replacement.source, replacement.key, replacement.position) == (before[0].source, before[0].key, position)


def test_replacements_reach_other_windows() -> None:
    order = Order([source("a", [200])], FRAMES, 8, 0)
    assert len({order.clip(3, attempt).start for attempt in range(16)}) > 8
    assert len({order.clip(position, 1).start for position in range(40)}) > 20


@given(st.integers(1, 500), st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_depends_on_its_key() -> None:
    assert len({tuple(permute(index, 50, key) for index in range(50)) for key in range(100)}) == 100


def test_positions_without_end_at_constant_memory() -> None:
    order = Order([source("a", [40] * 1000, 0.7), source("b", [90] * 500, 0.3)], FRAMES, 64, 3)

    def peak(first: int) -> int:
        """Bytes that 200 blocks from a position on need at most, once the caches are full."""
        for position in range(first + 10**6, first + 10**6 + 200 * 64, 64):
            order.clip(position)
        tracemalloc.start()
        try:
            for position in range(first, first + 200 * 64, 64):
                order.clip(position)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peaks = [peak(first) for first in (10, 10**9, 10**12)]
    assert max(peaks) < 1.1 * peaks[0] + 10_000, "numbers beyond 2**30 take a few bytes more"
    assert max(peaks) < 1_000_000


def test_hash_names_the_sequence() -> None:
    def build(seed: int = 1, block: int = 8, frames: int = FRAMES, weight: float = 0.5, content: str = "x", stride: int = 1) -> Order:
        return Order([source("a", [40, 30], weight, stride, content), source("b", [50], 0.5, stride)], frames, block, seed)

    assert build().hash_until(0) == build().hash_until(10**12)
    changed = [build(seed=2), build(block=16), build(frames=4), build(weight=0.6), build(content="y"), build(stride=2)]
    swapped = Order(list(reversed(build().sources)), FRAMES, 8, 1)
    assert len({order.hash_until(0) for order in (build(), swapped, *changed)}) == 8


def test_runs_of_earlier_versions_keep_their_sequence() -> None:
    """Golden values: a change here makes every checkpoint refer to clips that it was not trained on."""
    sources = [source("robot", [40, 33, 60, 7], 0.5, content="x"), source("hand", [90, 25, 50], 0.3, stride=2, content="y")]
    order = Order([*sources, source("sim", [12, 9], 0.123, content="z")], FRAMES, 16, 7)
    assert order.hash_until(1000) == "bfeba9d91bdcf7a637d28ffd16a3c6b83b4eb9f1ce8f937ec5733dec578e067c"
    for position, expected in GOLDEN.items():
        assert tuple(vars(order.clip(position)).values()) == (position, *expected)
    replacements = [order.clip(position, attempt) for position, attempt in ((3, 1), (3, 2), (10**12, 5))]
    assert [(ref.source, ref.episode, ref.start) for ref in replacements] == [(1, 0, 27), (1, 0, 79), (2, 0, 3)]
    many = [
        tuple(vars(order.clip(position)).values())
        for first, count in ((0, 20_000), (10**12, 2_000))
        for position in range(first, first + count)
    ]
    assert hashlib.sha256(repr(many).encode()).hexdigest() == "20f4faefa640325d8ced25f5eba51161c2192fdc64a8840fbd92bc6596095eef"


def test_seed_changes_the_sequence_and_nothing_else_is_needed_to_repeat_it() -> None:
    sources = [source("a", [400], 0.5), source("b", [400], 0.5)]
    one, again, other = (Order(sources, FRAMES, 8, seed) for seed in (1, 1, 2))
    assert [one.clip(p) for p in reversed(range(50))] == [again.clip(p) for p in range(50)][::-1]
    assert [one.clip(p) for p in range(50)] != [other.clip(p) for p in range(50)]


@pytest.mark.parametrize("all_", [[], [4], [4, 4, 1]])
def test_a_source_without_one_clip_is_refused(all_: list[int]) -> None:
    with pytest.raises(ValueError, match=r"source 'short' has no episode of at least 5 frames"):
        Order([source("long", [40]), source("short", all_)], FRAMES, 8, 0)
    with pytest.raises(ValueError, match=r"no episode"):
        Order([source("strided", [8], stride=2)], FRAMES, 8, 0)


@pytest.mark.parametrize(("weight", "needed"), [(0.01, 100), (1e-9, 990_000_001)])
def test_a_share_below_one_clip_a_block_is_refused(weight: float, needed: int) -> None:
    with pytest.raises(
        ValueError, match=rf"'rare' has less than one clip per mixture block of 64: raise data.mixture_block to at least {needed} "
    ):
        Order([source("often", [40], 0.99), source("rare", [40], weight)], FRAMES, 64, 0)


@given(st.integers(0, 2**64 - 1), st.floats(0.01, 1.0))
def test_crops_stay_in_the_picture(key: int, smallest: float) -> None:
    side, x, y = crop_of(key, smallest)
    assert smallest <= side <= 1
    assert 0 <= x <= 1
    assert 0 <= y <= 1
