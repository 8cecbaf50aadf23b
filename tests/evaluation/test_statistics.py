from __future__ import annotations

import math
import re
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from cola_dist.errors import UserError
from cola_dist.evaluation.statistics import (
    ArmTable,
    Method,
    bootstrap_interval,
    compare_arms,
    default_method,
    holm,
    markdown_table,
    paired_test,
    paired_test_clips,
    rows,
    smallest_p,
    verdict_line,
    winner,
)

# Binary fractions: sums and differences of them are exact, so that invariances hold to the last digit where they should.
eighths = st.integers(-400, 400).map(lambda value: value / 8)
pairs = st.lists(st.tuples(eighths, eighths), min_size=2, max_size=9)


def by_seed(values: object) -> dict[int, float]:
    return {seed: float(value) for seed, value in enumerate(np.asarray(values))}


def arms_at(means: Mapping[str, float], seeds: int, spread: float, draw: int = 0) -> dict[str, dict[int, float]]:
    rng = np.random.default_rng(draw)
    return {name: by_seed(mean + spread * rng.normal(size=seeds)) for name, mean in means.items()}


# Intervals


@pytest.mark.parametrize(("seeds", "least"), [(5, 0.87), (10, 0.91), (20, 0.92)])
def test_bootstrap_intervals_cover_the_mean_about_as_often_as_they_say(seeds: int, least: float) -> None:
    rng = np.random.default_rng(0)
    intervals = [bootstrap_interval(rng.normal(3, 2, seeds).tolist(), resamples=800) for _ in range(400)]
    assert least < np.mean([interval.low <= 3 <= interval.high for interval in intervals]) < 0.985


def test_a_bootstrap_interval_of_many_values_is_that_of_scipy() -> None:
    values = np.random.default_rng(0).lognormal(size=300)
    theirs = stats.bootstrap((values,), np.mean, method="BCa", n_resamples=10_000, rng=np.random.default_rng(0)).confidence_interval
    ours = bootstrap_interval(values.tolist())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.02 * (theirs.high - theirs.low))
    assert ours.high - ours.mean > 1.1 * (ours.mean - ours.low)


def test_bootstrap_intervals_of_few_values_stay_within_them() -> None:
    one, two, same = bootstrap_interval([2.0]), bootstrap_interval([1.0, 2.0]), bootstrap_interval([2.0] * 5)
    assert (one.mean, one.n) == (2, 1)
    assert math.isnan(one.low)
    assert math.isnan(one.high)
    assert (two.low, two.mean, two.high) == (1, 1.5, 2)
    assert (same.low, same.mean, same.high) == (2, 2, 2)


def test_a_lone_outlier_at_a_high_level_keeps_the_interval_in_order() -> None:
    interval = bootstrap_interval([0.0, 0.0, 0.0, 0.01, 50.0], level=0.999)
    assert 0 <= interval.low < interval.mean < interval.high <= 50


@given(values=st.lists(eighths, min_size=3, max_size=8), shift=eighths, scale=st.sampled_from([0.25, 1e-6, 8.0, -1.0]))
@settings(max_examples=25, deadline=None)
def test_bootstrap_intervals_follow_the_unit_of_their_values(values: list[float], shift: float, scale: float) -> None:
    plain = bootstrap_interval(values, resamples=500)
    moved = bootstrap_interval([scale * value + shift for value in values], resamples=500)
    ends = sorted([scale * plain.low + shift, scale * plain.high + shift])
    assert moved.mean == pytest.approx(scale * plain.mean + shift, abs=1e-9)
    assert [moved.low, moved.high] == pytest.approx(ends, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [1.0, math.inf, 2.0]])
def test_a_bootstrap_of_nothing_or_of_nan_is_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"^values: .*(no value|not finite)"):
        bootstrap_interval(values)


# Paired tests


def test_sign_flip_on_a_case_by_hand() -> None:
    # Differences 1, 2, 3, -1 with sum 5. Of the 16 patterns, as extreme are: none flipped (5), -1 flipped (7), 1 flipped (3, no),
    # 1 and -1 flipped (5); and their mirror images: 6 of 16.
    test = paired_test({0: 2, 1: 4, 2: 6, 3: 0}, {0: 1, 1: 2, 2: 3, 3: 1}, "sign-flip", level=0.75)
    assert test.p == 6 / 16
    assert (test.difference, test.interval.n, test.method, test.superiority) == (1.25, 4, "sign-flip", 0.75)
    # The 15 subset means, sorted: -1, 0, 1/2, 2/3, 1, 1, 1, 5/4, 4/3, ..., 5/2, 3. Of 16 patterns 12.5 % lie outside either end: the
    # second from below and above.
    assert (test.interval.low, test.interval.high) == (0, 2.5)


def test_five_pairs_cannot_be_significant_by_sign_flip_but_by_t() -> None:
    a, b = by_seed([11, 12, 13, 14, 15.5]), by_seed([1, 2, 3, 4, 5])
    flipped, t = paired_test(a, b, "sign-flip"), paired_test(a, b)
    assert flipped.p == smallest_p(5) == 0.0625
    assert (flipped.interval.low, flipped.interval.high) == (-math.inf, math.inf)
    assert t.method == "t"
    assert t.p < 1e-5
    assert t.interval.low > 9


@pytest.mark.parametrize("seeds", [3, 6, 10])
def test_paired_tests_agree_with_scipy(seeds: int) -> None:
    rng = np.random.default_rng(seeds)
    a, b = rng.normal(0.7, 1, seeds), rng.normal(0, 1, seeds)
    t, theirs = paired_test(by_seed(a), by_seed(b), "t"), stats.ttest_rel(a, b)
    assert t.p == pytest.approx(theirs.pvalue, rel=1e-9)
    assert (t.interval.low, t.interval.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)), rel=1e-9)
    exact = stats.permutation_test((a, b), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf)
    assert paired_test(by_seed(a), by_seed(b), "sign-flip").p == pytest.approx(exact.pvalue, rel=1e-9)


def test_drawn_sign_patterns_come_near_the_exact_p() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.normal(0.5, 1, 16), rng.normal(0, 1, 16)
    exact = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis), permutation_type="samples", n_resamples=2**16, vectorized=True
    )
    drawn = paired_test(by_seed(a), by_seed(b), "sign-flip")
    assert drawn.p == pytest.approx(exact.pvalue, abs=0.01)
    assert drawn == paired_test(by_seed(a), by_seed(b), "sign-flip")
    apart = paired_test(by_seed(np.arange(30) + 100.0), by_seed(np.arange(30) * 0.5))
    assert apart.method == "sign-flip"
    assert apart.p == pytest.approx(smallest_p(30))


@given(values=pairs, level=st.sampled_from([0.5, 0.8, 0.9, 0.95]), method=st.sampled_from(["t", "sign-flip"]))
@settings(max_examples=60, deadline=None)
def test_an_interval_leaves_out_zero_where_its_test_rejects(values: list[tuple[float, float]], level: float, method: Method) -> None:
    test = paired_test(by_seed([a for a, _ in values]), by_seed([b for _, b in values]), method, level)  # type: ignore[arg-type]
    assume(method == "sign-flip" or abs(test.p - (1 - level)) > 1e-9)
    assert (test.interval.low > 0 or test.interval.high < 0) == (test.p <= 1 - level + 1e-9)


@given(values=pairs, shift=eighths, scale=st.sampled_from([0.125, 2.0, 1024.0]), method=st.sampled_from(["t", "sign-flip", None]))
@settings(max_examples=60, deadline=None)
def test_shift_scale_and_swap(values: list[tuple[float, float]], shift: float, scale: float, method: Method | None) -> None:
    a, b = by_seed([a for a, _ in values]), by_seed([b for _, b in values])
    test = paired_test(a, b, method)  # type: ignore[arg-type]
    swapped = paired_test(b, a, method)  # type: ignore[arg-type]
    assert swapped.p == pytest.approx(test.p, rel=1e-9)
    assert swapped.difference == -test.difference
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-test.interval.high, -test.interval.low), rel=1e-9, abs=1e-12)
    assert swapped.effect == pytest.approx(-test.effect, nan_ok=True)
    assert swapped.superiority == pytest.approx(1 - test.superiority)
    moved = [{seed: scale * value + shift for seed, value in arm.items()} for arm in (a, b)]
    other = paired_test(*moved, method)  # type: ignore[arg-type]
    assert other.p == pytest.approx(test.p, rel=1e-9)
    assert other.difference == pytest.approx(scale * test.difference)
    assert (other.effect, other.superiority) == pytest.approx((test.effect, test.superiority), nan_ok=True)


def test_rounding_does_not_break_ties() -> None:
    test = paired_test(by_seed([0.3, 0.2, 0.7, 0.6, 0.1, 0.8]), by_seed([0.2, 0.1, 0.6, 0.7, 0.2, 0.9]), "sign-flip")
    assert test.p == 1
    assert test.superiority == 0.5


def test_effect_sizes_by_hand() -> None:
    test = paired_test(by_seed([1, 2, 3, 5]), by_seed([0, 0, 0, 5]), "t")
    # Differences 1, 2, 3, 0: mean 3/2, standard deviation sqrt(5/3); correction 1 - 3 / (4 * 3 - 1); three wins and a tie.
    assert test.effect == pytest.approx(1.5 / math.sqrt(5 / 3) * 8 / 11)
    assert test.superiority == 3.5 / 4
    assert math.isnan(paired_test({0: 1, 1: 3}, {0: 0, 1: 0}).effect)


def test_equal_differences_are_no_certainty() -> None:
    test = paired_test(by_seed([0.3, 0.4, 0.5]), by_seed([0.2, 0.3, 0.4]), "t")
    assert (test.method, test.p, test.effect) == ("sign-flip", 0.25, math.inf)
    same = paired_test(by_seed([0.3, 0.4, 0.5]), by_seed([0.3, 0.4, 0.5]))
    assert (same.p, same.effect, same.superiority, same.difference) == (1, 0, 0.5, 0)


def test_only_common_seeds_count() -> None:
    test = paired_test({0: 1.0, 1: 2.0, 2: 4.0, 7: 99.0}, {2: 1.0, 1: 1.0, 0: 0.5, 8: -99.0}, "t")
    assert test == paired_test({0: 1.0, 1: 2.0, 2: 4.0}, {0: 0.5, 1: 1.0, 2: 1.0}, "t")
    assert test.interval.n == 3


def test_the_default_can_reach_significance_or_is_t() -> None:
    assert [default_method(5), default_method(6)] == ["t", "sign-flip"]
    assert [default_method(6, 3), default_method(7, 3), default_method(8, 10), default_method(9, 10)] == ["t", "sign-flip"] * 2
    assert default_method(30, 45) == "sign-flip"
    assert paired_test(by_seed(range(6)), by_seed([1, 3, 2, 5, 3, 1])).method == "sign-flip"


@pytest.mark.parametrize(
    ("a", "b", "complaint"),
    [
        ({0: 1.0}, {1: 1.0}, r"two common seeds; a has \[0\] and b has \[1\]"),
        ({0: 1.0, 1: 1.0}, {1: 1.0}, "two common seeds"),
        ({0: 1.0, 1: 1.0}, {0: 1.0, 1: math.nan}, "b, seed 1: 1 of 1 values are not finite"),
    ],
)
def test_what_cannot_be_paired_is_refused(a: dict[int, float], b: dict[int, float], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        paired_test(a, b)


def test_unknown_methods_are_refused() -> None:
    a = by_seed([1, 2, 3])
    with pytest.raises(ValueError, match="paired_test_clips"):
        paired_test(a, a, "hierarchical")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'wilcoxon'"):
        paired_test_clips(a, a, "wilcoxon")  # type: ignore[arg-type]


# Paired tests on clips


def clips(
    rng: np.random.Generator, seeds: int, by_run: float, by_clip: float, noise: float, gain: float = 0.0
) -> list[dict[int, np.ndarray]]:
    """Two arms, whose difference has a part for each run, one for each clip, one for each value, and ``gain``."""
    base = rng.normal(size=(seeds, 20))
    change = gain + by_run * rng.normal(size=(seeds, 1)) + by_clip * rng.normal(size=(1, 20)) + noise * rng.normal(size=(seeds, 20))
    return [dict(enumerate(base + change)), dict(enumerate(base))]


def test_clips_do_not_count_as_runs() -> None:
    a, b = clips(np.random.default_rng(0), 4, 1, 0, 0.1)
    test = paired_test_clips(a, b)
    assert test.method == "t"
    means = [{seed: float(values.mean()) for seed, values in arm.items()} for arm in (a, b)]
    assert test.p == pytest.approx(paired_test(*means).p)
    assert test.p > 1000 * stats.ttest_rel(np.concatenate([*a.values()]), np.concatenate([*b.values()])).pvalue


@pytest.mark.parametrize(("by_run", "by_clip"), [(1.0, 0.0), (0.2, 1.0)])
def test_the_hierarchical_test_keeps_its_level_over_runs_and_clips(by_run: float, by_clip: float) -> None:
    rng = np.random.default_rng(0)
    tests = [paired_test_clips(*clips(rng, 6, by_run, by_clip, 0.3), "hierarchical", resamples=1000) for _ in range(200)]
    assert np.mean([test.p <= 0.05 for test in tests]) < 0.09
    assert all((test.p > 0.05) == (test.interval.low <= 0 <= test.interval.high) for test in tests)


def test_the_hierarchical_test_finds_a_clear_difference_and_follows_a_swap() -> None:
    a, b = clips(np.random.default_rng(0), 6, 0.2, 0.2, 0.3, gain=1.0)
    test, swapped = paired_test_clips(a, b, "hierarchical"), paired_test_clips(b, a, "hierarchical")
    assert test.method == "hierarchical"
    assert test.p == test.adjusted == pytest.approx(swapped.p)
    assert test.p < 0.05
    assert 0.3 < test.interval.low < 1 < test.interval.high < 1.7
    assert (swapped.interval.low, swapped.interval.high) == pytest.approx((-test.interval.high, -test.interval.low))


def test_what_no_draw_can_tell_the_hierarchical_test_leaves_open() -> None:
    test = paired_test_clips(*clips(np.random.default_rng(0), 3, 0.01, 0, 0.01, gain=5), "hierarchical")
    assert 0.05 < test.p < 0.1
    assert (test.interval.low, test.interval.high) == (-math.inf, math.inf)
    copies = paired_test_clips({seed: np.arange(4.0) for seed in range(5)}, {seed: np.ones(4) for seed in range(5)}, "hierarchical")
    assert (copies.method, copies.p) == ("sign-flip", 0.0625)


def test_runs_on_other_clips_are_refused() -> None:
    a = {0: np.ones(3), 1: np.ones(4)}
    with pytest.raises(ValueError, match="differ in their number of clips"):
        paired_test_clips(a, a)
    with pytest.raises(ValueError, match="a, seed 1: 1 of 3 values are not finite"):
        paired_test_clips({0: np.ones(3), 1: [1, math.nan, 2]}, {0: np.ones(3), 1: np.ones(3)})
    with pytest.raises(ValueError, match="a, seed 0: there is no value"):
        paired_test_clips({0: [], 1: []}, {0: [], 1: []})


# Multiplicity


def test_holm_by_hand() -> None:
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last, 0.04, may not fall below 0.06.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1, 1]
    assert holm([]) == []
    first, second, third = holm([0.01, math.nan, 0.5])
    assert (first, third) == (0.02, 0.5)
    assert math.isnan(second)


@given(p_values=st.lists(st.floats(0, 1), min_size=1, max_size=12), data=st.data())
@settings(max_examples=100, deadline=None)
def test_holm_keeps_order_and_never_lowers(p_values: list[float], data: st.DataObject) -> None:
    adjusted = holm(p_values)
    assert all(raw <= new <= 1 for raw, new in zip(p_values, adjusted, strict=True))
    assert all(new <= min(1, raw * len(p_values)) for raw, new in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values)
    assert np.all(np.diff(np.array(adjusted)[order]) >= 0)
    shuffle = data.draw(st.permutations(range(len(p_values))))
    assert holm([p_values[i] for i in shuffle]) == [adjusted[i] for i in shuffle]
    assert holm([*p_values, math.nan])[:-1] == adjusted


@pytest.mark.parametrize("p_values", [[0.5, 1.01], [-0.1]])
def test_holm_refuses_what_is_no_p(p_values: list[float]) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm(p_values)


# Tables and winners


def bold(table: ArmTable) -> list[str]:
    return re.findall(r"\*\*(.+?)\*\*", markdown_table(table, "success"))


@pytest.mark.parametrize(("better", "expected"), [("higher", "cola"), ("lower", "scratch")])
def test_a_clear_winner_is_named_and_bold(better: str, expected: str) -> None:
    results = arms_at({"scratch": 0.3, "no-warmup": 0.6, "cola": 0.9}, seeds=5, spread=0.02)
    table = compare_arms(results, "scratch", better)  # type: ignore[arg-type]
    assert winner(table) == expected
    assert verdict_line(table).startswith(f"winner: {expected}, {better} than every other arm (largest adjusted p ")
    assert bold(table)[0] == expected
    assert len(bold(table)) == 2
    assert [row["arm"] for row in rows(table) if row["winner"]] == [expected]


def test_overlapping_arms_have_no_winner_and_are_named() -> None:
    results = arms_at({"no-warmup": 0.78, "cola": 0.8, "scratch": 0.1}, seeds=5, spread=0.05)
    table = compare_arms(results, "cola", "higher")
    best = max(("cola", "no-warmup"), key=lambda name: np.mean(list(results[name].values())))
    other = "no-warmup" if best == "cola" else "cola"
    p = table.tests["cola", "no-warmup"].adjusted
    assert winner(table) is None
    assert verdict_line(table) == f"no winner: {best} and {other} cannot be told apart (adjusted p = {p:.3g}, 5 seeds)"
    assert bold(table) == []
    assert not any(row["winner"] for row in rows(table))
    many = verdict_line(compare_arms(arms_at(dict.fromkeys("abc", 0.5), seeds=5, spread=0.1), "a", "higher"))
    assert re.fullmatch(r"no winner: . cannot be told apart from . \(adjusted p = .+\) or . \(adjusted p = .+\), 5 seeds", many)


def test_identical_arms_have_no_winner() -> None:
    table = compare_arms({name: by_seed([1, 2, 3, 4, 5, 6, 7]) for name in ("a", "b")}, "a", "higher")
    assert winner(table) is None
    assert table.tests["a", "b"].adjusted == 1


def test_what_one_comparison_would_pass_fails_among_many() -> None:
    results = arms_at({"a": 0.0, "b": 0.0}, seeds=5, spread=1.0)
    results["b"] = {seed: value + noise for (seed, value), noise in zip(results["a"].items(), [1, 2, 0.5, 3, 1.5], strict=True)}
    alone = compare_arms(results, "a", "higher")
    among = compare_arms(results | arms_at({"c": -30.0, "d": -60.0, "e": -90.0}, seeds=5, spread=3.0, draw=1), "a", "higher")
    assert winner(alone) == "b"
    assert among.tests["a", "b"].p == alone.tests["a", "b"].p < 0.05
    assert among.tests["a", "b"].adjusted >= alone.tests["a", "b"].adjusted


@pytest.mark.parametrize("third", [0.0, -50.0])
def test_winners_under_the_null_are_at_most_as_frequent_as_alpha(third: float) -> None:
    """Two arms are equal at the top; the third is equal too, or so far below that only the two compete."""
    tables = [compare_arms(arms_at({"a": 0, "b": 0, "c": third}, 5, 1.0, draw), "a", "higher") for draw in range(300)]
    # Three standard errors of 300 draws above alpha.
    assert np.mean([winner(table) is not None for table in tables]) <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 300)


def test_tests_of_a_table_are_those_of_pairs_with_holm_over_all() -> None:
    results = arms_at({"a": 0.0, "b": 0.6, "c": 1.5}, seeds=8, spread=0.5)
    table = compare_arms(results, "a", "higher", alpha=0.1)
    once = {pair: paired_test(results[pair[0]], results[pair[1]], level=0.9) for pair in [("a", "b"), ("a", "c"), ("b", "c")]}
    for (pair, test), adjusted in zip(once.items(), holm([test.p for test in once.values()]), strict=True):
        assert (table.tests[pair].interval, table.tests[pair].p, table.tests[pair].adjusted) == (test.interval, test.p, adjusted)
        there, back = table.tests[pair], table.tests[pair[::-1]]
        assert (back.p, back.adjusted, back.difference, back.effect) == (there.p, there.adjusted, -there.difference, -there.effect)
    assert len(table.tests) == 6


def test_missing_seeds_are_left_out_everywhere_and_reported() -> None:
    results = arms_at({"cola": 0.9, "no-warmup": 0.8, "scratch": 0.3}, seeds=6, spread=0.02)
    whole = compare_arms({name: {seed: values[seed] for seed in (0, 2, 3, 5)} for name, values in results.items()}, "cola", "higher")
    del results["scratch"][1], results["scratch"][4]
    results["cola"][4] = 1e6
    table = compare_arms(results, "cola", "higher")
    assert table.seeds == (0, 2, 3, 5)
    assert [(arm.name, arm.interval.n, arm.missing) for arm in table.arms] == [
        ("cola", 4, ()),
        ("no-warmup", 4, ()),
        ("scratch", 4, (1, 4)),
    ]
    assert table.tests == whole.tests
    assert verdict_line(table).endswith("4 seeds); seeds left out: scratch lacks 1, 4")
    assert rows(table)[2]["missing"] == [1, 4]


def test_rows_and_markdown_hold_the_same_numbers() -> None:
    table = compare_arms(arms_at({"cola": 0.9, "scratch": 0.3}, seeds=5, spread=0.02), "scratch", "higher")
    cola, scratch = rows(table)
    test = table.tests["cola", "scratch"]
    assert (cola["difference"], cola["p"], cola["adjusted"], cola["method"]) == (test.difference, test.p, test.adjusted, "t")
    assert (cola["difference_low"], cola["difference_high"]) == (test.interval.low, test.interval.high)
    assert "difference" not in scratch
    assert scratch["n"] == 5
    header, rule, *lines = markdown_table(table, "success").split("\n")
    assert header.startswith("| arm | success, higher is better | difference to scratch |")
    assert [line.count("|") for line in (header, rule, *lines[:2])] == [7] * 4
    assert f"{test.difference:.4g} [{test.interval.low:.4g}, {test.interval.high:.4g}]" in lines[0]
    assert lines[1].endswith("| – | – | – | – |")
    assert lines[3] == verdict_line(table) + "."
    assert "95 % interval" in lines[5]
    assert "paired t, Holm over all pairs (1)" in lines[5]


@pytest.mark.parametrize(
    ("results", "reference", "complaint"),
    [
        ({"cola": {0: 1.0, 1: 2.0}}, "cola", "two arms, not 1"),
        ({"cola": {0: 1.0, 1: 2.0}, "scratch": {0: 1.0, 1: 2.0}}, "colla", "no arm 'colla': did you mean 'cola'?"),
        ({"cola": {0: 1.0, 1: 2.0}, "scratch": {0: 1.0, 1: 2.0}}, "xyz", "choose one of cola, scratch"),
        ({"cola": {0: 1.0, 1: 2.0}, "scratch": {0: 1.0, 1: math.nan}}, "cola", "arm 'scratch', seed 1: the value is nan"),
        ({"cola": {0: 1.0, 1: 2.0}, "scratch": {2: 1.0}}, "cola", "need two seeds in common and have 0 (cola has 0, 1; scratch has 2)"),
        ({"cola": {0: 1.0}, "scratch": {0: 1.0}}, "cola", "have 1 (cola has 0; scratch has 0)"),
        ({"cola": {0: 1.0}, "scratch": {}}, "cola", "scratch has none"),
    ],
)
def test_what_a_user_can_mend_is_said_in_one_line(results: dict[str, dict[int, float]], reference: str, complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)) as error:
        compare_arms(results, reference, "higher")
    assert "\n" not in str(error.value)


def test_wrong_directions_and_levels_are_refused() -> None:
    results = arms_at({"a": 0, "b": 1}, seeds=3, spread=1)
    with pytest.raises(ValueError, match=r"not 'best' and 0\.05"):
        compare_arms(results, "a", "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not 'higher' and 5"):
        compare_arms(results, "a", "higher", alpha=5)
