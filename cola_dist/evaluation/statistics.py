"""Comparing the arms of a study over seeds: intervals, paired tests, corrected p-values, and a winner only where the tests support one.

The unit of replication is the seed. Clips of one run share its weights, so a thousand clips of three seeds are three observations of a
training method, and the tests here count them so. Values have the metric's own unit throughout.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit

from cola_dist.errors import UserError

Floats = NDArray[np.float64]
Method = Literal["t", "sign-flip", "hierarchical"]
"""``t``: paired t-test on the seeds' mean differences, with pairs - 1 degrees of freedom. Any p is within reach; it takes the differences
for normal, which a handful of seeds can neither show nor refute. One diverged seed inflates the spread and costs power.

``sign-flip``: permutation test on the same differences (Fisher 1935). It only takes their distribution for symmetric about 0 if the arms
are equal, and is exact up to `EXACT_PAIRS`. Its p cannot fall below `smallest_p`.

``hierarchical``: bootstrap over seeds and clips; see `paired_test_clips`."""

EXACT_PAIRS = 14
"""Up to so many pairs `sign-flip` goes through all sign patterns; above it draws `FLIPS` of them."""
FLIPS = 20_000
ROUNDING = 1e-12
"""Differences below this share of the largest value are rounding."""


@dataclass(frozen=True)
class Interval:
    """A mean and its interval; ``low`` and ``high`` are NaN where one value allows no interval."""

    mean: float
    low: float
    high: float
    n: int
    """Number of seeds."""

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


@dataclass(frozen=True)
class PairedTest:
    """Arm a against arm b on their common seeds."""

    interval: Interval
    """Of the mean difference a - b, by ``method``, not corrected: it leaves out 0 where ``p`` < 1 - level, and is infinite if p cannot be."""
    p: float
    """Two-sided, not corrected for other comparisons."""
    method: Method
    """What gave ``p`` and ``interval``."""
    effect: float
    """Mean difference in standard deviations of the difference (Cohen's d_z) with Hedges' correction for few pairs (Hedges 1981). NaN for
    two pairs, where it has no finite expectation; infinite for equal differences other than 0."""
    superiority: float
    """Share of seeds on which a is the higher one; a tie counts half."""
    adjusted: float
    """``p`` after `holm` over the pairs of a table; ``p`` itself for a test on its own."""

    @property
    def difference(self) -> float:
        """Mean of a - b."""
        return self.interval.mean

    def swapped(self) -> PairedTest:
        """The same test seen from b."""
        interval = Interval(-self.interval.mean, -self.interval.high, -self.interval.low, self.interval.n)
        return replace(self, interval=interval, effect=-self.effect, superiority=1 - self.superiority)


@dataclass(frozen=True)
class Arm:
    """One arm on the seeds that all arms share."""

    name: str
    interval: Interval
    missing: tuple[int, ...]
    """Seeds that another arm has and this one lacks. No arm is judged on them."""


@dataclass(frozen=True)
class ArmTable:
    """All arms of a study under one metric."""

    reference: str
    better: Literal["higher", "lower"]
    alpha: float
    seeds: tuple[int, ...]
    """Those that all arms share, and all that the table rests on."""
    arms: tuple[Arm, ...]
    tests: Mapping[tuple[str, str], PairedTest]
    """The test of every arm (first name) against every other (second name), so each pair both ways."""


def bootstrap_interval(values: Sequence[float], level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """The mean of ``values``, one per seed, and its bootstrap interval; for one value ``low`` and ``high`` are NaN: there is none.

    From three values that vary on it is BCa (Efron 1987, "Better bootstrap confidence intervals", with the jackknife's acceleration),
    otherwise percentile; both at the expanded level of Hesterberg 2015 ("What teachers should know about the bootstrap"), without which
    they are as narrow as if n were large. No bootstrap leaves the range of its values: at 95 %, 3, 5 and 10 normal values gave coverages
    of 0.75, 0.91 and 0.95 (0.73, 0.84 and 0.90 without the expansion). Skewed values are covered less often, by a t interval too.
    Raises `ValueError` for no values, or for one that is not finite.
    """
    x = _finite(values, "values")
    n, mean = len(x), float(x.mean())
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    draws = x[np.random.default_rng(seed).integers(n, size=(resamples, n))].mean(1)
    z = _expanded(level, n) * np.array([-1.0, 1.0])
    rounding = ROUNDING * float(np.abs(x).max())
    if n >= 3 and np.ptp(x) > rounding:
        deviation = (x - mean) / np.ptp(x)  # scaled, or cubes of small values would be 0
        acceleration = (deviation**3).sum() / (6 * (deviation**2).sum() ** 1.5)
        # Draws that equal the mean count half. Kept off 0 and 1, where a few resamples could put it.
        below = ((draws < mean - rounding).sum() + (draws <= mean + rounding).sum()) / (2 * resamples)
        bias = ndtri(np.clip(below, 1 / (resamples + 1), resamples / (resamples + 1)))
        # Far out the correction has a pole, behind which it would change sides; from there on the interval ends at the outermost draw.
        slope = np.maximum(1 - acceleration * (bias + z), 1e-9)
        z = bias + (bias + z) / slope
    low, high = np.quantile(draws, ndtr(z))
    return Interval(mean, float(low), float(high), n)


def smallest_p(pairs: int) -> float:
    """The smallest p that `sign-flip` can reach: 2^(1 - pairs), above `EXACT_PAIRS` 2 / (FLIPS + 1).

    With five seeds 0.0625: no sign-flip test of five pairs is significant at 0.05, however far the arms lie apart.
    """
    return 2.0 ** (1 - pairs) if pairs <= EXACT_PAIRS else 2 / (FLIPS + 1)


def default_method(pairs: int, comparisons: int = 1, alpha: float = 0.05) -> Literal["t", "sign-flip"]:
    """``sign-flip`` where it can reach significance after Holm's correction for so many ``comparisons``, otherwise ``t``.

    For one comparison at 0.05 that is from six pairs on, for the three of three arms from seven, for the ten of five arms from nine. Below,
    a test of weaker assumptions would be a test without power, and t says more, under an assumption to be named. The numbers of seeds and
    arms decide and never the values, so that nobody can try both tests and keep the better p.
    """
    return "sign-flip" if smallest_p(pairs) * comparisons < alpha else "t"


def paired_test(
    a: Mapping[int, float], b: Mapping[int, float], method: Literal["t", "sign-flip"] | None = None, level: float = 0.95, seed: int = 0
) -> PairedTest:
    """Test the mean difference a - b over the common seeds (keys); ``method`` is `default_method` unless given.

    The interval is the test's own: of t, or all shifts that the sign-flip test does not reject (Hartigan 1969, "Using subsample values as
    typical values"), which is infinite where the test cannot reject at all. Differences that are all equal give no estimate of spread;
    t would take them for certain, so they get the sign-flip test. ``seed`` draws sign patterns above `EXACT_PAIRS`.
    Raises `ValueError` for fewer than two common seeds or a value that is not finite.
    """
    if method not in (None, "t", "sign-flip"):
        raise ValueError(f"paired_test knows the methods t and sign-flip, not {method!r}; hierarchical needs clips: paired_test_clips")
    return paired_test_clips(a, b, method, level, seed=seed)


def paired_test_clips(
    a: Mapping[int, ArrayLike],
    b: Mapping[int, ArrayLike],
    method: Method | None = None,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> PairedTest:
    """Test the mean difference a - b from per-clip values ``[clips]`` by seed, entry i being the same clip in both arms and every seed.

    ``t`` and ``sign-flip``, between which `default_method` chooses, test the seeds' means: would other seeds give this sign on these
    clips? ``hierarchical`` asks for other seeds and other clips of the same kind. Each of its draws takes seeds with replacement, and
    clips with replacement, the same for all its seeds (Owen 2007, "The pigeonhole bootstrap"): clips drawn anew within each seed would
    average away what a clip does to all seeds. Interval and p are expanded for few seeds as in `bootstrap_interval`.

    False positives at 0.05 in simulations without a difference, three and five seeds of 40 clips: t 0.05, but up to 0.2 and 0.4 for
    the question of other clips where clips favour an arm; hierarchical 0.00 and 0.01 to 0.07; a bootstrap without expansion 0.08 to 0.22
    and 0.07 to 0.15, with clips drawn within each seed 0.20 to 0.25 and 0.15 to 0.34. The price: hierarchical counts noise of single
    clips more than once, and its p ends near 0.09 for three seeds and 0.03 for five with 10,000 resamples. Clips cut from one episode
    are fewer than they seem: pass means of episodes.

    Raises `ValueError` as `paired_test`, and where numbers of clips differ.
    """
    if method not in (None, "t", "sign-flip", "hierarchical"):
        raise ValueError(f"the methods are t, sign-flip and hierarchical, not {method!r}")
    common = sorted(a.keys() & b.keys())
    if (n := len(common)) < 2:
        raise ValueError(f"a paired test needs two common seeds; a has {sorted(a)} and b has {sorted(b)}: run the missing ones")
    x, y = ([_finite(arm[key], f"{name}, seed {key}") for key in common] for arm, name in ((a, "a"), (b, "b")))
    if len({len(values) for values in [*x, *y]}) > 1:
        raise ValueError("the runs differ in their number of clips: evaluate all on the same ones, or compare their means with paired_test")
    differences = np.stack(x) - np.stack(y)
    rounding = ROUNDING * float(np.abs([x, y]).max())
    test = _test(differences.mean(1), rounding, method or default_method(n), level, seed)
    if test.method != "hierarchical":
        return test
    draws = _pigeonhole(differences, resamples, np.random.default_rng(seed))
    tail = (1 + min((draws <= rounding).sum(), (draws >= -rounding).sum())) / (resamples + 1)
    p = min(1.0, 2 * float(stdtr(n - 1, ndtri(tail) * math.sqrt((n - 1) / n))))
    return replace(test, interval=Interval(test.difference, *_ends(draws, ndtr(-_expanded(level, n))), n), p=p, adjusted=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values that bound the chance of any false rejection among all (Holm 1979), under any dependence; at most 1.

    NaN stands for a comparison that was not made: it stays NaN and does not count. Raises `ValueError` for a p outside 0 to 1.
    """
    p = np.asarray(p_values, dtype=np.float64)
    if ((p < 0) | (p > 1)).any():
        raise ValueError(f"p-values lie between 0 and 1, not {list(p_values)}")
    made = np.flatnonzero(~np.isnan(p))
    order = made[np.argsort(p[made], kind="stable")]
    adjusted = p.copy()
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)))
    return [float(value) for value in adjusted]


def compare_arms(
    results: Mapping[str, Mapping[int, float]], reference: str, better: Literal["higher", "lower"], alpha: float = 0.05
) -> ArmTable:
    """Compare all arms, each given as one value per seed, pair by pair with `paired_test`, and correct with `holm` over all pairs.

    Only seeds that all arms share count, so that means, tests and winner speak of the same runs; ``Arm.missing`` names the others. Runs
    that failed because of their arm leave a kinder set of seeds behind: no test mends that. Intervals are at level 1 - ``alpha``.
    Raises `UserError` for an unknown reference, fewer than two arms or shared seeds, or a value that is not finite.
    """
    if len(results) < 2:
        raise UserError(f"a comparison needs two arms, not {len(results)}: add the runs of another arm")
    if reference not in results:
        near = difflib.get_close_matches(reference, results, 1)
        raise UserError(f"no arm {reference!r}: {f'did you mean {near[0]!r}?' if near else 'choose one of ' + ', '.join(results)}")
    if better not in ("higher", "lower") or not 0 < alpha < 1:
        raise ValueError(f"better is 'higher' or 'lower' and alpha between 0 and 1, not {better!r} and {alpha}")
    for name, values in results.items():
        for key, value in values.items():
            if not math.isfinite(value):
                raise UserError(f"arm {name!r}, seed {key}: the value is {value}; repeat that run, or leave its seed out and say so")
    known = set().union(*results.values())
    shared = tuple(sorted(known.intersection(*results.values())))
    if len(shared) < 2:
        listing = "; ".join(f"{name} has {', '.join(map(str, sorted(values))) or 'none'}" for name, values in results.items())
        raise UserError(f"the arms need two seeds in common and have {len(shared)} ({listing}): run what is missing or leave an arm out")
    arms = tuple(
        Arm(name, bootstrap_interval([values[key] for key in shared], 1 - alpha), tuple(sorted(known - set(values))))
        for name, values in results.items()
    )
    pairs = list(combinations(results, 2))
    method = default_method(len(shared), len(pairs), alpha)
    common = {name: {key: values[key] for key in shared} for name, values in results.items()}
    once = {(a, b): paired_test(common[a], common[b], method, 1 - alpha) for a, b in pairs}
    adjusted = holm([test.p for test in once.values()])
    tests = {pair: replace(test, adjusted=p) for (pair, test), p in zip(once.items(), adjusted, strict=True)}
    return ArmTable(reference, better, alpha, shared, arms, tests | {(b, a): test.swapped() for (a, b), test in tests.items()})


def winner(table: ArmTable) -> str | None:
    """The arm of the best mean, if its adjusted p against every other arm is below alpha; otherwise nobody."""
    best, rivals = _best(table)
    return None if rivals else best


def verdict_line(table: ArmTable) -> str:
    """One sentence: who wins, or which arms cannot be told apart from the one of the best mean."""
    best, rivals = _best(table)
    seeds = f"{len(table.seeds)} seeds"
    if not rivals:
        largest = max(test.adjusted for (arm, _), test in table.tests.items() if arm == best)
        line = f"winner: {best}, {table.better} than every other arm (largest adjusted p {_p(largest)}, {seeds})"
    elif len(rivals) == 1:
        line = f"no winner: {best} and {rivals[0]} cannot be told apart (adjusted p {_p(table.tests[best, rivals[0]].adjusted)}, {seeds})"
    else:
        listing = " or ".join(f"{name} (adjusted p {_p(table.tests[best, name].adjusted)})" for name in rivals)
        line = f"no winner: {best} cannot be told apart from {listing}, {seeds}"
    gaps = [f"{arm.name} lacks {', '.join(map(str, arm.missing))}" for arm in table.arms if arm.missing]
    return line + (f"; seeds left out: {'; '.join(gaps)}" if gaps else "")


def rows(table: ArmTable) -> list[dict[str, object]]:
    """One line per arm, in the order given, as plain values; all but the reference's hold its test against the reference too.

    ``winner`` is true on the line that `winner` names, and on none without one.
    """
    lines: list[dict[str, object]] = []
    for arm in table.arms:
        lines.append({"arm": arm.name, "winner": arm.name == winner(table), **asdict(arm.interval), "missing": list(arm.missing)})
        if arm.name != table.reference:
            test = table.tests[arm.name, table.reference]
            span = {"difference": test.difference, "difference_low": test.interval.low, "difference_high": test.interval.high}
            lines[-1] |= span | {name: value for name, value in asdict(test).items() if name != "interval"}
    return lines


def markdown_table(table: ArmTable, metric_name: str) -> str:
    """The table and, below it, the verdict and how to read the columns. A winner's name and mean are bold; without one nothing is."""
    lines = [
        f"| arm | {metric_name}, {table.better} is better | difference to {table.reference} | effect | superiority | adjusted p |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for arm in table.arms:
        bold = "**" if arm.name == winner(table) else ""
        cells = "– | – | – | –"
        if arm.name != table.reference:
            test = table.tests[arm.name, table.reference]
            cells = f"{test.interval} | {test.effect:.2f} | {test.superiority:.2f} | {_p(test.adjusted).removeprefix('= ')}"
        lines.append(f"| {bold}{arm.name}{bold} | {bold}{arm.interval}{bold} | {cells} |")
    methods = " and ".join(sorted({test.method for test in table.tests.values()}))
    note = (
        f"Mean [{100 * (1 - table.alpha):g} % interval] over {len(table.seeds)} seeds, each interval on its own. Effect: d_z with Hedges' "
        f"correction. Superiority: share of seeds on which the arm is higher. p: paired {methods}, Holm over all pairs ({len(table.tests) // 2})."
    )
    return "\n".join([*lines, "", f"{verdict_line(table)}.", "", note])


def _best(table: ArmTable) -> tuple[str, list[str]]:
    """The arm of the best mean, and those that it does not beat."""
    choose = max if table.better == "higher" else min
    best = choose(table.arms, key=lambda arm: arm.interval.mean).name
    return best, [b for (a, b), test in table.tests.items() if a == best and test.adjusted >= table.alpha]


def _test(differences: Floats, rounding: float, method: Method, level: float, seed: int) -> PairedTest:
    """One test on the differences of seeds; for ``hierarchical`` interval and p are t's, for the caller to replace."""
    n, mean, spread = len(differences), float(differences.mean()), float(differences.std(ddof=1))
    constant = bool(np.ptp(differences) <= rounding)
    method = "sign-flip" if constant else method
    if method == "sign-flip":
        low, high, p = _sign_flip(differences, rounding, level, seed)
    else:
        error = spread / math.sqrt(n)
        reach = -float(stdtrit(n - 1, (1 - level) / 2)) * error
        low, high, p = mean - reach, mean + reach, 2 * float(stdtr(n - 1, -abs(mean) / error))
    if constant:
        effect = 0.0 if abs(mean) <= rounding else math.copysign(math.inf, mean)
    else:
        effect = mean / spread * (1 - 3 / (4 * (n - 1) - 1)) if n > 2 else math.nan
    superiority = float(((differences > rounding) + 0.5 * (np.abs(differences) <= rounding)).mean())
    return PairedTest(Interval(mean, low, high, n), p, method, effect, superiority, p)


def _sign_flip(differences: Floats, rounding: float, level: float, seed: int) -> tuple[float, float, float]:
    """(low, high, p). Flipping a subset of signs lowers the sum of differences less a shift by twice the subset's own.

    A shift is therefore as extreme as the share of subsets whose mean it exceeds: the order statistics of those means end the interval.
    The pattern without a flip counts too, once, which for drawn patterns is the correction that keeps the test valid.
    """
    n = len(differences)
    if n <= EXACT_PAIRS:
        flipped = (np.arange(1, 2**n)[:, None] >> np.arange(n) & 1).astype(bool)
    else:
        flipped = np.random.default_rng(seed).integers(2, size=(FLIPS, n)).astype(bool)
        flipped = flipped[flipped.any(1)]
    means = flipped @ differences / flipped.sum(1)
    beyond = min((means <= rounding).sum(), (means >= -rounding).sum())
    return *_ends(means, (1 - level) / 2), min(1.0, 2 * (1 + int(beyond)) / (len(means) + 1))


def _ends(draws: Floats, tail: float) -> tuple[float, float]:
    """The interval with a share ``tail`` of ``draws`` and the observed one outside either end; infinite for a share of less than one."""
    # Rounded up a little: 0.05 of 20 draws is one, whatever 1 - 0.95 is in binary.
    outside = math.floor(tail * (len(draws) + 1) + 1e-9)
    ordered = np.sort(draws)
    return (float(ordered[outside - 1]), float(ordered[-outside])) if outside else (-math.inf, math.inf)


def _pigeonhole(values: Floats, resamples: int, rng: np.random.Generator) -> Floats:
    """Means of ``values [seeds, clips]`` with both axes drawn with replacement; in parts, since each draw weighs every clip."""
    seeds, clips = values.shape
    draws = []
    for start in range(0, resamples, 500):
        count = min(500, resamples - start)
        by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), count)
        by_clip = rng.multinomial(clips, np.full(clips, 1 / clips), count)
        draws.append((by_seed @ values * by_clip).sum(1) / (seeds * clips))
    return np.concatenate(draws)


def _expanded(level: float, n: int) -> float:
    """The normal quantile at which a bootstrap of ``n`` values reaches as far as t: times sqrt(n / (n - 1)), its spread being too small."""
    return -float(stdtrit(n - 1, (1 - level) / 2)) * math.sqrt(n / (n - 1))


def _finite(values: ArrayLike, what: str) -> Floats:
    array = np.atleast_1d(np.asarray(values, dtype=np.float64))
    finite = np.isfinite(array)
    if array.ndim != 1 or not finite.all() or not len(array):
        found = f"{(~finite).sum()} of {array.size} values are not finite" if array.size else "there is no value"
        raise ValueError(f"{what}: {found}, shape {list(array.shape)}; repeat that run, or leave it out and say so")
    return array


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"= {p:.3g}"
