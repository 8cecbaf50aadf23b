"""Whether the latent actions say what the frozen generator's features say, and what their codes say about the true actions. Torch alone.

Rows are transitions, and transitions of one episode are no independent draws: wherever rows are split, batched or permuted, whole episodes
are. Sums run in float64; what is not finite makes figures nan. Latents and targets that both know the *source* of a clip agree in that alone,
and no control here removes it: give the rows of one source at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from cola_dist.diagnostics.codebook import entropy
from cola_dist.diagnostics.ridge import PENALTIES, solve, standardised

BATCH = 16
"""Rows of an InfoNCE batch, each of another episode. The bound cannot exceed log 16 = 2.77 nats."""
TEMPERATURES: tuple[float, ...] = tuple(10.0 ** (power / 5) for power in range(-10, 6))
"""Temperatures of the cosine critic tried; at the last one the bound is about 0 whatever the rows are."""
_BATCHES = 512
_INNER_FOLDS = 5
_PERMUTATIONS = 20
MIN_EPISODES = 2 * BATCH
"""Episodes that `alignment` needs."""


@dataclass(frozen=True)
class RidgeAlignment:
    """How well a ridge map from latent actions predicts the targets of episodes that it was not fitted on."""

    cosine: float
    """Mean cosine between mapped latents and targets, both less their mean over the fitted rows; about 0 for latents that say nothing."""
    r2: float
    """Share of the targets' squared distance from the fitted mean that the map explains, over all dimensions together."""
    penalty: float
    """Ridge penalty per row; the geometric mean of those that the two halves chose."""


@dataclass(frozen=True)
class MutualInformation:
    """Plug-in mutual information between codes and binned actions, in nats, mean over the action dimensions that vary."""

    nats: float
    """As counted: biased upwards by about (codes - 1)(bins - 1) / 2M, and by what episodes have in common."""
    permuted_mean: float
    """The same with the actions of other episodes, mean over permutations: an estimate of that bias."""
    permuted_std: float
    """Standard deviation over those permutations."""
    normalised: float
    """``corrected`` as a share of the entropy of the binned actions; 0 where no action varies."""

    @property
    def corrected(self) -> float:
        """``nats`` less ``permuted_mean``: about 0 for codes that say nothing, below the truth for codes that say nearly everything."""
        return self.nats - self.permuted_mean


@dataclass(frozen=True)
class _Rows:
    """Latents mapped by a fit that did not see their episodes ``[m, Q]``, targets less the fitted mean ``[m, Q]``, episodes ``[m]``."""

    mapped: Tensor
    target: Tensor
    episode: Tensor


@dataclass(frozen=True)
class _Half:
    """The rows of one half of the episodes, and those of the other half, which it was fitted on, as cross-validation mapped them."""

    heldout: _Rows
    fitted: _Rows
    penalty: float


def alignment(z: Tensor, target: Tensor, episode: Tensor, seed: int) -> dict[str, float]:
    """Agreement of latent actions ``z [M, P]`` with features ``target [M, Q]`` of the same transitions, of episodes ``episode [M]`` (int).

    ``alignment/cka`` (`linear_cka`), ``alignment/cosine`` and ``alignment/r2`` (`ridge_alignment`), and ``alignment/infonce`` in nats
    (`infonce_bound` of both halves' held-out rows, mean). ``NAME/permuted`` is each with every target replaced by that of another episode,
    in an order drawn from ``seed``. Whole runs of rows move together, so the control keeps what rows of one episode, or at one place in
    their clips, have in common by themselves: read a figure by its distance from its control. Of 300 independent rows (P = 64, Q = 256, 300
    draws) figures and controls have means within 0.001 of 0 and standard deviations below 0.006. Targets are centred, not scaled: channels
    that vary most weigh most. Raises `ValueError` with fewer than 32 episodes or where one has more than half of the rows.
    """
    _refuse_few(z, target, episode, MIN_EPISODES)
    z, target = z.double(), target.double()
    order = _other_episodes(episode, torch.Generator().manual_seed(seed))
    figures: dict[str, float] = {}
    for suffix, rows in (("", target), ("/permuted", target[order])):
        halves = _halves(z, rows, episode)
        ridge = _ridge_scores(halves)
        bounds = [infonce_bound(*_parts(half.heldout), _temperature(half.fitted, seed), seed) for half in halves]
        values = {"cka": linear_cka(z, rows), "cosine": ridge.cosine, "r2": ridge.r2, "infonce": sum(bounds) / len(bounds)}
        figures |= {f"alignment/{name}{suffix}": value for name, value in values.items()}
    return figures


def linear_cka(x: Tensor, y: Tensor) -> float:
    """Debiased linear CKA of ``x [M, P]`` and ``y [M, Q]``: 1 for the same geometry, about 0 (either sign) for independent rows.

    Kornblith et al. 2019 (1905.00414) with the unbiased HSIC of Song et al. 2012, as in Nguyen et al. 2021 (2010.15327, eq. 3) and Murphy
    et al. 2024 (2405.01012): the plain estimator is far above 0 for independent rows unless M exceeds P + Q many times. Rows that are no
    independent draws raise it: where episodes cluster on both sides, though each in its own way, it is above 0, and so is its permuted
    control in `alignment`. 0 where a side does not vary. Two M x M matrices of float64 are held. Raises `ValueError` with fewer than four rows.
    """
    if len(x) != len(y) or len(x) < 4:
        raise ValueError(f"CKA needs at least four rows on both sides, not {len(x)} and {len(y)}")
    left, right = _centred_gram(x).flatten(), _centred_gram(y).flatten()
    # Of a gram matrix scaled to a mean diagonal of 1, what is below this is rounding.
    floor = 1e-18 * len(left)
    own_left, own_right = float(left @ left), float(right @ right)
    return 0.0 if own_left <= floor or own_right <= floor else float(left @ right) / math.sqrt(own_left * own_right)


def ridge_alignment(z: Tensor, target: Tensor, episode: Tensor) -> RidgeAlignment:
    """A ridge map from ``z [M, P]`` to ``target [M, Q]``, fitted on half of the episodes ``episode [M]``, scored on the rest, both ways.

    Latents are standardised and targets centred by the fitted rows. The penalty is chosen by five-fold cross-validation over the fitted
    episodes. The halves are drawn by a fixed seed, not by number, because numbers may alternate between sources; they are the same at
    each evaluation. Raises `ValueError` with fewer than four episodes.
    """
    _refuse_few(z, target, episode, 4)
    return _ridge_scores(_halves(z.double(), target.double(), episode))


def infonce_bound(mapped: Tensor, target: Tensor, episode: Tensor, temperature: float, seed: int) -> float:
    """InfoNCE lower bound, in nats, on the mutual information of ``mapped [m, Q]`` and ``target [m, Q]``, of episodes ``episode [m]``.

    log K - E[cross-entropy of each row's own target among the K = 16 of its batch] with the critic ``cos(mapped, target) / temperature``
    (van den Oord et al. 2018, 1807.03748, eq. 4; Poole et al. 2019, 1905.06922). At most log K = 2.77, and below 0 for a critic that
    is wrong. Of Gaussian rows in 4 to 32 dimensions with a known map and 0.1 to 2 nats between them it finds 0.6 to 0.9; a fitted map loses
    more. It is a bound if the critic knows nothing of these rows and the K targets are independent draws. So a batch has one row from each of
    K episodes: several of one episode are fewer draws than K, and the bound breaks or, if they look alike, compares a row with itself. K is
    fixed, because the value depends on it, and small, because the demo's held-out set has 46 episodes. An episode counts the same however
    many rows it has. Batches are drawn from ``seed``. Raises `ValueError` with fewer
    than 16 episodes.
    """
    cosines = _batched_cosines(mapped.double(), target.double(), episode, torch.Generator().manual_seed(seed))
    return _bound(cosines, temperature)


def plugin_mutual_information(codes: Tensor, actions: Tensor, episode: Tensor, codebook: int, bins: int, seed: int) -> MutualInformation:
    """Mutual information of ``codes [M, N]`` (int64, below ``codebook``) and true ``actions [M, A]``, of episodes ``episode [M]`` (int).

    Each action dimension is cut into ``bins`` by rank, so that cells are filled alike and units do not matter; equal values share a
    bin. Dimensions are averaged, as a joint histogram of A dimensions would have more cells than rows. The N slots count as one joint
    code if that leaves a row per cell (``codebook**N * bins <= M``); otherwise the slot that says most about a dimension stands for all, which
    is at most what the joint code says (data processing). The rule looks at sizes only, so that figures of one run compare.
    The permuted figures pair codes with the actions of other episodes in 20 orders drawn from ``seed``, and go through the same maximum, so
    its upward pull is in them too. Raises `ValueError` where one episode has more than half of the rows.
    """
    if codebook ** codes.shape[1] * bins <= len(codes):
        codes = (codes * codebook ** torch.arange(codes.shape[1], device=codes.device)).sum(1, keepdim=True)
        codebook = int(codes.max()) + 1
    hot = F.one_hot(codes, codebook).double()
    cells = F.one_hot(_rank_bins(_varying(actions), bins), bins).double()
    if cells.shape[1] == 0:
        return MutualInformation(0.0, 0.0, 0.0, 0.0)
    nats = _information(hot, cells)
    generator = torch.Generator().manual_seed(seed)
    permuted = torch.tensor([_information(hot, cells[_other_episodes(episode, generator)]) for _ in range(_PERMUTATIONS)])
    mean = float(permuted.mean())
    return MutualInformation(nats, mean, float(permuted.std()), (nats - mean) / float(entropy(cells.sum(0)).mean()))


def true_action_perplexity(actions: Tensor, bins: int) -> float:
    """exp of the mean entropy of the dimensions of ``actions [M, A]`` that vary, each in ``bins`` cells; 1 if none varies.

    What the perplexity of codes can be measured against: codes cannot be used more evenly than the actions are without splitting hairs.
    The cells have equal widths between the 1st and 99th percentile (by rank they would be full alike whatever the actions are).
    """
    values = _varying(actions)
    if values.shape[1] == 0:
        return 1.0
    low, high = torch.quantile(values, torch.tensor([0.01, 0.99], dtype=values.dtype, device=values.device), dim=0)
    # A dimension that hardly ever leaves one value.
    rare = high <= low
    low, high = torch.where(rare, values.amin(0), low), torch.where(rare, values.amax(0), high)
    cell = ((values - low) / (high - low) * bins).long().clamp(0, bins - 1)
    return math.exp(float(entropy(F.one_hot(cell, bins).sum(0)).mean()))


def modulation_share(action_square: Tensor, time_square: Tensor) -> dict[str, float]:
    """``modulation_share/blockI``, the action's part of the mean squared modulation of block I, and ``modulation_share``, their mean.

    ``action_square [blocks]`` and ``time_square [blocks]`` are mean squares of what action and flow time add. 0 where both are 0.
    """
    action, total = action_square.double(), action_square.double() + time_square.double()
    shares = torch.where(total > 0, action / total.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return {"modulation_share": float(shares.mean())} | {f"modulation_share/block{i}": float(share) for i, share in enumerate(shares)}


def gradient_agreement(flow: Sequence[Tensor], other: Sequence[Tensor]) -> dict[str, float]:
    """``gradient_norm/flow``, ``gradient_norm/other`` and ``gradient_cosine`` of two losses' gradients of the same parameters.

    Each sequence counts as one vector. The cosine is left out where a norm is 0 or not finite. Raises `ValueError` where shapes differ.
    """
    if [a.shape for a in flow] != [b.shape for b in other]:
        raise ValueError("gradients of different parameters cannot be compared")
    norms = [math.sqrt(sum(float(part.double().square().sum()) for part in gradient)) for gradient in (flow, other)]
    figures = {"gradient_norm/flow": norms[0], "gradient_norm/other": norms[1]}
    if all(0 < norm < math.inf for norm in norms):
        parts = (float((a.double() / norms[0]).flatten() @ (b.double() / norms[1]).flatten()) for a, b in zip(flow, other, strict=True))
        figures["gradient_cosine"] = sum(parts)
    return figures


def _refuse_few(z: Tensor, target: Tensor, episode: Tensor, episodes: int) -> None:
    if not len(z) == len(target) == len(episode):
        raise ValueError(f"latents, targets and episodes are of {len(z)}, {len(target)} and {len(episode)} rows")
    if len(episode.unique()) < episodes:
        raise ValueError(f"an alignment needs {episodes} episodes, not {len(episode.unique())}")


def _other_episodes(episode: Tensor, generator: torch.Generator) -> Tensor:
    """For each row the number of a row of another episode, each row once.

    Episodes in random order, all rows moved on by the size of the largest: no row stays in its episode, neighbours stay neighbours, and
    with clips of equal length the place in the clip stays too.
    """
    known, index, counts = episode.unique(return_inverse=True, return_counts=True)
    longest = int(counts.max())
    if 2 * longest > len(episode):
        raise ValueError(f"a permutation between episodes needs none with more than half of the rows, not {longest} of {len(episode)}")
    rank = torch.randperm(len(known), generator=generator).to(episode.device)
    rows = rank[index].argsort(stable=True)
    order = torch.empty_like(rows)
    order[rows] = rows.roll(-longest)
    return order


def _less(values: Tensor, mean: Tensor) -> Tensor:
    """``values - mean``; exact zeros where nothing but rounding is left."""
    rest = values - mean
    return torch.where(rest.square().mean() <= 1e-24 * values.square().mean(), 0.0, rest)


def _centred_gram(x: Tensor) -> Tensor:
    """U-centred linear gram matrix ``[M, M]``: diagonal 0, rows sum to 0; the unbiased HSIC is the mean product of two of them."""
    x = x.double()
    rows = _less(x, x.mean(0))
    rows = rows / rows.square().sum(1).mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    gram = (rows @ rows.T).fill_diagonal_(0)
    count = len(gram)
    means = gram.sum(1) / (count - 2)
    gram.sub_(means).sub_(means[:, None]).add_(means.sum() / (count - 1))
    return gram.fill_diagonal_(0)


def _folds(episode: Tensor, folds: int) -> Tensor:
    """The fold of each row; an episode is in one fold."""
    known, index = episode.unique(return_inverse=True)
    fold = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)) % min(folds, len(known))
    return fold.to(episode.device)[index]


def _halves(z: Tensor, target: Tensor, episode: Tensor) -> list[_Half]:
    fold = _folds(episode, 2)
    return [_fit_rest(z, target, episode, fold == half) for half in range(2)]


def _fit_rest(z: Tensor, target: Tensor, episode: Tensor, heldout: Tensor) -> _Half:
    """Fits where ``heldout`` is false, with the penalty whose maps of other episodes there leave the smallest residual."""
    known_z, known_target = z[~heldout], target[~heldout]
    fold = _folds(episode[~heldout], _INNER_FOLDS)
    centred = torch.empty_like(known_target)
    mapped = centred.new_empty(len(PENALTIES), *centred.shape)
    for inner in (fold == number for number in range(int(fold.max()) + 1)):
        # Centred by the other folds alone: around a common mean, these folds' mean is the others' mirrored, and any map would know it.
        x, y = _centred(known_z, known_target, ~inner)
        centred[inner] = y[inner]
        for place, penalty in enumerate(PENALTIES):
            mapped[place, inner] = x[inner] @ solve(x[~inner], y[~inner], penalty)
    best = int((mapped - centred).square().sum((1, 2)).argmin())
    x, y = _centred(z, target, ~heldout)
    weights = solve(x[~heldout], y[~heldout], PENALTIES[best])
    rows = _Rows(x[heldout] @ weights, y[heldout], episode[heldout])
    return _Half(rows, _Rows(mapped[best], centred, episode[~heldout]), PENALTIES[best])


def _centred(z: Tensor, target: Tensor, fit: Tensor) -> tuple[Tensor, Tensor]:
    return standardised(z, fit), _less(target, target[fit].mean(0))


def _ridge_scores(halves: Sequence[_Half]) -> RidgeAlignment:
    mapped = torch.cat([half.heldout.mapped for half in halves])
    target = torch.cat([half.heldout.target for half in halves])
    total = float(target.square().sum())
    r2 = 1 - float((target - mapped).square().sum()) / total if total != 0 else 0.0
    cosine = float((_unit(mapped) * _unit(target)).sum(1).mean())
    return RidgeAlignment(cosine, r2, math.sqrt(math.prod(half.penalty for half in halves)))


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1, eps=torch.finfo(torch.float64).tiny)


def _parts(rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    return rows.mapped, rows.target, rows.episode


def _batched_cosines(mapped: Tensor, target: Tensor, episode: Tensor, generator: torch.Generator) -> Tensor:
    """Cosines ``[batches, BATCH, BATCH]`` of mapped latents (rows) and targets (columns); the diagonal is of one transition."""
    _, counts = episode.unique(return_counts=True)
    if len(counts) < BATCH:
        raise ValueError(f"an InfoNCE batch needs {BATCH} held-out episodes, not {len(counts)}")
    # In each round one row of every episode, the episodes in random order, as many whole batches as that gives.
    batches = len(counts) // BATCH
    chance = torch.rand(2, math.ceil(_BATCHES / batches), len(counts), generator=generator, dtype=torch.float64).to(episode.device)
    rows = episode.argsort(stable=True)[counts.cumsum(0) - counts + (chance[0] * counts).long()]
    rows = rows.gather(1, chance[1].argsort(1))[:, : batches * BATCH].reshape(-1, BATCH)
    return (_unit(mapped) @ _unit(target).T)[rows[:, :, None], rows[:, None, :]]


def _bound(cosines: Tensor, temperature: float) -> float:
    own = (cosines / temperature).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    return math.log(BATCH) + float(own.mean())


def _temperature(fitted: _Rows, seed: int) -> float:
    """The temperature with the largest bound on the fitted rows, as maps that did not see their episodes place them."""
    cosines = _batched_cosines(*_parts(fitted), torch.Generator().manual_seed(seed))
    return max(TEMPERATURES, key=lambda temperature: _bound(cosines, temperature))


def _varying(actions: Tensor) -> Tensor:
    """The columns of ``actions`` that vary, float64."""
    return actions[:, actions.amax(0) > actions.amin(0)].double()


def _rank_bins(values: Tensor, bins: int) -> Tensor:
    """``values [M, A]`` cut into ``bins`` (two or more) per column by rank, int64.

    Equal values have the middle of their ranks: a column of two values, such as a gripper's, keeps both however unequal their shares.
    """
    columns = torch.empty(values.shape, dtype=torch.int64, device=values.device)
    for place, column in enumerate(values.unbind(1)):
        _, index, counts = column.unique(return_inverse=True, return_counts=True)
        middle = counts.cumsum(0) - counts / 2
        columns[:, place] = (middle / len(column) * bins).long()[index]
    return columns


def _information(hot: Tensor, cells: Tensor) -> float:
    """Plug-in information of one-hot codes ``[M, S, K]`` and one-hot bins ``[M, A, B]``: the largest over S, mean over A."""
    tables = torch.einsum("msk,mab->sakb", hot, cells)
    nats = entropy(hot.sum(0))[:, None] + entropy(cells.sum(0)) - entropy(tables.flatten(2))
    return float(nats.amax(0).mean())
