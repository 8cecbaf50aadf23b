"""Mixtures that change during a run, and shares by size: exact in every stage, without repetition across them, and fixed before a later one."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cola_dist.config import DataConfig
from cola_dist.data.order import ClipRef, EpisodeSpan, Order, Source, rank_positions
from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from tests.toy import write_folder

FRAMES = 5
BATCH = 24
"""Divides by every number of workers that is tried."""
NAMES = "abcd"
SIZES = {"a": (40, 33, 9), "b": (90,), "c": (12, 9), "d": (7,)}
Stages = Mapping[int, Mapping[str, float]]

weights = st.sampled_from([0.25, 0.5, 0.7, 1.0, 2.3, 3.0])
mixtures = st.dictionaries(st.sampled_from(NAMES), weights, min_size=1)
steps = st.integers(1, 12)
stage_maps = st.dictionaries(steps, mixtures, max_size=4)
blocks = st.integers(60, 90)
seeds = st.integers(0, 2**63 - 1)


def build(base: Mapping[str, float], stages: Stages, block: int, seed: int, temperature: float = 0.0) -> Order:
    """An order with sources in order of first appearance and stages by step, as a reader makes it."""
    names = dict.fromkeys(itertools.chain(base, *(stages[step] for step in sorted(stages))))
    sources = [Source(n, base.get(n, 0.0), tuple(EpisodeSpan(length, 1) for length in SIZES[n]), n) for n in names]
    by_position = {step * BATCH: mixture for step, mixture in stages.items()}
    return Order(sources, FRAMES, block, seed, by_position, temperature)


def clips(order: Order, positions: Sequence[int]) -> list[ClipRef]:
    return [order.clip(position) for position in positions]


def names_drawn(order: Order, positions: Sequence[int]) -> list[str]:
    return [order.sources[order.clip(position).source].name for position in positions]


@settings(max_examples=25, deadline=None)
@given(mixtures, stage_maps, blocks, seeds)
def test_the_mixture_is_exact_in_every_whole_block_and_over_each_stage(
    base: dict[str, float], stages: dict[int, dict[str, float]], block: int, seed: int
) -> None:
    order = build(base, stages, block, seed)
    begins = [0, *(step * BATCH for step in sorted(stages))]
    ends = [*begins[1:], begins[-1] + 6 * block]
    for begin, end, mixture in zip(begins, ends, [base, *(stages[step] for step in sorted(stages))], strict=True):
        share = {name: Fraction(str(w)) / sum(Fraction(str(w)) for w in mixture.values()) for name, w in mixture.items()}
        total: Counter[str] = Counter()
        for first in range(begin, end - block + 1, block):
            drawn = Counter(names_drawn(order, range(first, first + block)))
            total += drawn
            assert drawn.keys() == mixture.keys() if first == begin else drawn.keys() <= mixture.keys()
            for name, part in share.items():
                assert abs(drawn[name] - part * block) < 2
                assert abs(total[name] - part * (first + block - begin)) <= 1, "what one block lacks the next one gives"
        assert set(names_drawn(order, range(begin, end))) <= mixture.keys(), "a block that is cut draws from the same mixture"
        counted = Counter(names_drawn(order, range(end - 7)))
        assert order.drawn(end - 7) == [counted[source.name] for source in order.sources]


@settings(max_examples=25, deadline=None)
@given(mixtures, stage_maps, blocks, seeds)
def test_epochs_run_on_across_stages(base: dict[str, float], stages: dict[int, dict[str, float]], block: int, seed: int) -> None:
    order = build(base, stages, block, seed)
    shown: dict[int, dict[int, Counter[tuple[int, int]]]] = defaultdict(lambda: defaultdict(Counter))
    for ref in clips(order, range(18 * BATCH)):
        shown[ref.source][ref.epoch][ref.episode, ref.start] += 1
    for source, epochs in shown.items():
        sizes = {epoch: sum(windows.values()) for epoch, windows in epochs.items()}
        assert all(count == 1 for windows in epochs.values() for count in windows.values()), "a window twice in an epoch"
        # Slots of a block are shuffled: what it still owes to an epoch may come after the first clips of the next one.
        lacking = sum(order.windows(source) - sizes.get(epoch, 0) for epoch in range(max(sizes)))
        assert lacking < block, "less than a block of clips is outstanding, however often a mixture was cut"


@settings(max_examples=25, deadline=None)
@given(mixtures, stage_maps, steps, mixtures, blocks, seeds)
def test_a_stage_added_later_changes_nothing_before_it(
    base: dict[str, float], stages: dict[int, dict[str, float]], step: int, mixture: dict[str, float], block: int, seed: int
) -> None:
    known = {begin: stage for begin, stage in stages.items() if begin < step}
    before = build(base, known, block, seed)
    later = {begin: stage for begin, stage in stages.items() if begin > step}
    after = build(base, {**known, step: mixture, **later}, block, seed)
    assert clips(before, range(step * BATCH)) == clips(after, range(step * BATCH))
    for position in (0, 1, (step - 1) * BATCH + 1, step * BATCH):
        assert before.hash_until(position) == after.hash_until(position)
    assert before.hash_until(step * BATCH + 1) != after.hash_until(step * BATCH + 1)


def test_the_hash_names_every_stage_begun() -> None:
    base, stages = {"a": 1.0, "b": 1.0}, {3: {"a": 1.0, "c": 1.0}, 5: {"d": 1.0}}
    order = build(base, stages, 60, 0)
    assert len({order.hash_until(step * BATCH) for step in range(4)}) == 1, "a stage that begins at a position is not yet before it"
    changed = [{4: stages[3], 5: stages[5]}, {3: {"a": 2.0, "c": 1.0}, 5: stages[5]}, {3: stages[3]}, {}, {**stages, 6: {"d": 1.0}}]
    hashes = [build(base, other, 60, 0).hash_until(7 * BATCH) for other in (stages, *changed)]
    assert len(set(hashes)) == len(hashes)
    heavier = build(base, {3: {"a": 10.0, "c": 10.0}, 5: {"d": 3.0}}, 60, 0)
    assert heavier.hash_until(7 * BATCH) == hashes[0], "weights in the same proportion are the same mixture"
    assert clips(heavier, range(200)) == clips(order, range(200))


@settings(max_examples=15, deadline=None)
@given(mixtures, stage_maps, blocks, seeds, st.data())
def test_any_worker_asks_for_any_position_at_any_time(
    base: dict[str, float], stages: dict[int, dict[str, float]], block: int, seed: int, data: st.DataObject
) -> None:
    order = build(base, stages, block, seed)
    whole = clips(order, range(14 * BATCH))
    step = data.draw(st.integers(0, 13))
    for world in (1, 2, 3, 4, 8):
        resumed = pickle.loads(pickle.dumps(order)) if world == 2 else build(base, stages, block, seed)
        shares = [clips(resumed, rank_positions(step, BATCH, rank, world)) for rank in reversed(range(world))]
        assert [ref for share in reversed(shares) for ref in share] == whole[step * BATCH : (step + 1) * BATCH]
    shuffled = data.draw(st.permutations(range(0, 14 * BATCH, 7)))
    fresh = build(base, stages, block, seed)
    assert clips(fresh, shuffled) == [whole[position] for position in shuffled]


@settings(max_examples=25, deadline=None)
@given(mixtures, stage_maps, blocks, seeds, st.integers(0, 14 * BATCH), st.integers(1, 16))
def test_replacements_change_no_other_clip(
    base: dict[str, float], stages: dict[int, dict[str, float]], block: int, seed: int, position: int, attempt: int
) -> None:
    order, untouched = build(base, stages, block, seed), build(base, stages, block, seed)
    near = range(max(0, position - 3), position + 4)
    expected = clips(untouched, near)
    replacement = order.clip(position, attempt)
    assert clips(order, near) == expected
    assert replacement == untouched.clip(position, attempt)
    assert (replacement.source, replacement.key) == (untouched.clip(position).source, untouched.clip(position).key)


@pytest.mark.parametrize("begin", [10**9, 10**12])
def test_stages_far_away_are_exact_too(begin: int) -> None:
    order = build({"a": 0.7, "b": 0.3}, {begin: {"b": 0.5, "c": 0.5}, begin + 10: {"a": 0.7, "b": 0.3}}, 64, 0)
    far = begin * BATCH
    refs = clips(order, range(far - 700, far + 900))
    seen = Counter((ref.source, ref.epoch, ref.episode, ref.start) for ref in refs)
    assert max(seen.values()) == 1
    assert Counter(names_drawn(order, range(far, far + 64))) == {"b": 32, "c": 32}
    assert abs(refs[0].epoch * order.windows(refs[0].source) - far * (0.7, 0.3)[refs[0].source]) < 800


@settings(max_examples=30, deadline=None)
@given(mixtures, st.sampled_from([0.5, 1.0, 2.0, 5.0]), seeds)
def test_temperature_weighs_sources_by_their_size(base: dict[str, float], temperature: float, seed: int) -> None:
    clips_of = {name: sum(length // FRAMES for length in SIZES[name]) for name in base}
    parts = {name: weight * clips_of[name] ** (1 / temperature) for name, weight in base.items()}
    block = 200
    assume(min(parts.values()) * block > 1.01 * sum(parts.values()))
    order = build(base, {2: base}, block, seed, temperature)
    for first, count in ((0, 2 * BATCH), (2 * BATCH, 5 * block)):
        drawn = Counter(names_drawn(order, range(first, first + count)))
        if count % block == 0:
            assert all(abs(drawn[name] - count * part / sum(parts.values())) <= 1.01 for name, part in parts.items())


def test_a_high_temperature_comes_to_the_weights_alone_and_zero_is_off() -> None:
    base = {"a": 0.5, "b": 0.3, "c": 0.2}
    drawn = [Counter(names_drawn(build(base, {}, 100, 0, t), range(100))) for t in (0.0, 1e6, 1.0)]
    assert drawn[0] == drawn[1] == {"a": 50, "b": 30, "c": 20}
    windows = {"a": 15, "b": 18, "c": 3}
    total = sum(weight * windows[name] for name, weight in base.items())
    assert all(abs(drawn[2][name] - 100 * weight * windows[name] / total) < 2 for name, weight in base.items())


def test_a_share_below_one_clip_a_block_is_refused_with_its_stage() -> None:
    with pytest.raises(
        ValueError, match=r"'c' has less than one clip per mixture block of 60 from position 72 .* on: raise .* at least 101 "
    ):
        build({"a": 1.0}, {3: {"a": 1.0, "c": 0.01}}, 60, 0)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    path = tmp_path_factory.mktemp("folders")
    uris = {name: write_folder(path / name, name, seed=seed).uri for seed, name in enumerate(("robot", "hand", "late"))}
    stages = {2: {uris["late"]: 0.5, uris["hand"]: 0.5}}
    return DataConfig(mixture={uris["robot"]: 0.5, uris["hand"]: 0.5}, stages=stages, frames=FRAMES, resolution=16, mixture_block=8)


def test_a_reader_draws_the_stages_of_its_steps(config: DataConfig) -> None:
    reader = open_reader(config, seed=0, global_batch=8)
    assert [source.name for source in reader.order.sources] == ["robot", "hand", "late"]
    samples = [sample.split("/")[0] for sample in reader.read_many(range(32)).sample]
    assert Counter(samples[:16]) == {"robot": 8, "hand": 8}
    assert Counter(samples[16:]) == {"late": 8, "hand": 8}
    plain = open_reader(replace(config, stages={}), seed=0)
    assert plain.read_many(range(16)).sample.tolist() == reader.read_many(range(16)).sample.tolist()
    with pytest.raises(ValueError, match="global_batch is needed"):
        open_reader(config, seed=0)


def test_held_out_clips_keep_to_the_first_mixture(config: DataConfig) -> None:
    held_out, plain = (open_reader(c, 0, "heldout", 8) for c in (config, replace(config, stages={})))
    assert [source.name for source in held_out.order.sources] == ["robot", "hand"]
    assert held_out.read_many(range(40)).sample.tolist() == plain.read_many(range(40)).sample.tolist()


def test_a_reader_weighs_by_size(config: DataConfig, tmp_path: Path) -> None:
    large = write_folder(tmp_path / "large", "large", episodes=18).uri
    robot = next(iter(config.mixture))
    sized = replace(config, mixture={robot: 1.0, large: 1.0}, stages={}, temperature=1.0)
    reader = open_reader(sized, seed=0)
    assert [reader.order.windows(source) for source in (0, 1)] == [16, 48]
    assert Counter(reader.order.clip(position).source for position in range(8)) == {0: 2, 1: 6}


def test_a_stage_of_a_missing_folder_is_refused(config: DataConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone"):
        open_reader(replace(config, stages={5: {str(tmp_path / "gone"): 1.0}}), seed=0, global_batch=8)
    rare = replace(config, stages={5: {**config.mixture, next(iter(config.stages[2])): 0.01}})
    with pytest.raises(
        UserError, match=r"^data \(train split\): source 'late' has less than one clip per mixture block of 8 from position 40"
    ):
        open_reader(rare, seed=0, global_batch=8)
