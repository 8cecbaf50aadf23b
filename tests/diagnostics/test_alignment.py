from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.diagnostics.alignment import (
    BATCH,
    alignment,
    gradient_agreement,
    infonce_bound,
    linear_cka,
    modulation_share,
    plugin_mutual_information,
    ridge_alignment,
    true_action_perplexity,
)

SEEDS = range(5)
FIGURES = ("cka", "cosine", "r2", "infonce")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Many small products: threads that wait for each other on a busy machine cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, size: int) -> torch.Tensor:
    q: torch.Tensor = torch.linalg.qr(normal(seed, size, size))[0]
    return q


def episodes(count: int, per: int = 4) -> torch.Tensor:
    return torch.arange(count).repeat_interleave(per)


def related(seed: int, signal: float, count: int = 75, cluster: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents [M, 64] and targets [M, 256] that share eight hidden directions of size ``signal``, each with episode constants of its own."""
    episode = episodes(count)
    hidden = signal * normal(seed, len(episode), 8) / math.sqrt(8)
    z = hidden @ normal(seed + 1000, 8, 64) + normal(seed + 2000, len(episode), 64) + cluster * normal(seed + 3000, count, 64)[episode]
    target = (
        hidden @ normal(seed + 4000, 8, 256) + normal(seed + 5000, len(episode), 256) + cluster * normal(seed + 6000, count, 256)[episode]
    )
    return z, target, episode


def test_cka_of_the_same_geometry_is_one() -> None:
    x = normal(0, 500, 64)
    assert linear_cka(x, x) == pytest.approx(1)
    assert linear_cka(x.float(), (7 * x @ rotation(1, 64) - 3).float()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_cka_of_independent_rows_is_near_zero_where_the_plain_estimator_is_not(seed: int) -> None:
    x, y = normal(seed, 500, 64), normal(seed + 100, 500, 256)
    assert abs(linear_cka(x, y)) < 0.02
    centred_x, centred_y = x - x.mean(0), y - y.mean(0)
    plain = (centred_x.T @ centred_y).square().sum() / ((centred_x.T @ centred_x).norm() * (centred_y.T @ centred_y).norm())
    assert plain > 0.15


def test_cka_is_the_published_unbiased_hsic() -> None:
    def hsic(k: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        # Nguyen et al. 2021, eq. 3, letter by letter.
        n, one = len(k), torch.ones(len(k), 1, dtype=k.dtype)
        k, m = k - torch.diag(k.diagonal()), m - torch.diag(m.diagonal())
        middle = (one.T @ k @ one) * (one.T @ m @ one) / ((n - 1) * (n - 2))
        return ((k @ m).trace() + middle - 2 / (n - 2) * (one.T @ k @ m @ one)).squeeze() / (n * (n - 3))

    x = normal(0, 12, 3)
    y = x @ normal(1, 3, 5) + normal(2, 12, 5)
    k, m = x @ x.T, y @ y.T
    assert linear_cka(x, y) == pytest.approx(float(hsic(k, m) / (hsic(k, k) * hsic(m, m)).sqrt()))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(5, 40),
    scale=st.floats(1e-3, 1e3) | st.floats(-1e3, -1e-3),
    shift=st.floats(-100, 100),
)
def test_cka_heeds_neither_rotation_nor_scale_nor_translation_nor_order(seed: int, rows: int, scale: float, shift: float) -> None:
    x, y = normal(seed, rows, 4), normal(seed + 1, rows, 6)
    plain = linear_cka(x, y)
    assert -1 <= plain <= 1
    assert linear_cka(y, x) == pytest.approx(plain, abs=1e-9)
    assert linear_cka(scale * x @ rotation(seed + 2, 4) + shift, y) == pytest.approx(plain, abs=1e-6)
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
    assert linear_cka(x[order], y[order]) == pytest.approx(plain, abs=1e-9)


def test_cka_of_a_side_that_does_not_vary_is_zero() -> None:
    x, spike = normal(0, 50, 4), torch.zeros(50, 3)
    spike[7] = 1.0
    for flat in (torch.zeros(50, 3), torch.full((50, 3), 0.1), spike):
        assert linear_cka(x, flat) == 0
        assert linear_cka(flat, x) == 0
    with pytest.raises(ValueError, match="at least four rows on both sides, not 3 and 3"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(ValueError, match="not 50 and 49"):
        linear_cka(x, x[1:])


def test_a_linear_map_is_found_whatever_the_units() -> None:
    z = normal(0, 300, 6)
    score = ridge_alignment(5 * z + 2, 1e-9 * (z @ normal(1, 6, 20)) - 1e-8, episodes(75))
    assert score.cosine > 0.999
    assert score.r2 > 0.999
    assert score.penalty == pytest.approx(1e-3)


def test_noise_takes_its_share_of_r2_and_cosine() -> None:
    z = normal(0, 2000, 6)
    score = ridge_alignment(z, z @ rotation(1, 6) + normal(2, 2000, 6), episodes(500))
    assert score.r2 == pytest.approx(0.5, abs=0.03)
    assert 0.6 < score.cosine < 0.72


@pytest.mark.parametrize("seed", SEEDS)
def test_a_map_between_independent_rows_says_nothing(seed: int) -> None:
    score = ridge_alignment(normal(seed, 300, 64), normal(seed + 100, 300, 256), episodes(75))
    assert abs(score.cosine) < 0.03
    assert abs(score.r2) < 0.01
    assert score.penalty >= 10


def test_what_an_episode_has_in_common_does_not_leak_through_the_split() -> None:
    # Rows of one episode agree within each side, nothing agrees between the sides: a split by rows would know each episode's target.
    episode = episodes(40, per=8)
    z, target = normal(0, 40, 64)[episode] + 0.01 * normal(1, 320, 64), normal(2, 40, 64)[episode]
    assert ridge_alignment(z, target, torch.arange(320)).r2 > 0.9
    score = ridge_alignment(z, target, episode)
    assert abs(score.r2) < 0.05
    assert abs(score.cosine) < 0.1


def test_numbers_that_alternate_between_sources_do_not_split_by_source() -> None:
    # Each source moves in dimensions of its own: fitted on one, a map knows nothing of the other.
    episode = episodes(80)
    mine = (episode % 2)[:, None] == torch.arange(6) % 2
    z = normal(0, 320, 6) * mine
    assert ridge_alignment(z, z @ rotation(1, 6), episode).r2 > 0.99


def test_sides_that_do_not_vary_score_zero() -> None:
    x, flat, episode = normal(0, 160, 5), torch.full((160, 5), 0.1), episodes(40)
    for z, target in ((x, flat), (flat, x)):
        score = ridge_alignment(z, target, episode)
        assert (score.cosine, score.r2) == (0, pytest.approx(0, abs=1e-12))
        assert all(value == pytest.approx(0, abs=1e-9) for value in alignment(z, target, episode, seed=0).values())


@pytest.mark.parametrize("nats", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("dim", [8, 32])
def test_infonce_lies_below_a_known_information_and_above_six_tenths_of_it(nats: float, dim: int) -> None:
    # I = -d/2 log(1 - rho^2)
    rho = math.sqrt(1 - math.exp(-2 * nats / dim))
    x = normal(0, 4096, dim)
    y = rho * x + math.sqrt(1 - rho**2) * normal(1, 4096, dim)
    temperature = (1 - rho**2) / rho / dim
    bound = infonce_bound(x, y, episodes(1024), temperature, seed=0)
    assert 0.6 * nats < bound < nats


def test_infonce_of_the_same_rows_is_log_of_the_batch_though_rows_of_an_episode_look_alike() -> None:
    # With two rows of one episode in a batch, each of them would be the other's double.
    constants = normal(0, BATCH, 64)[episodes(BATCH, per=6)]
    assert infonce_bound(constants, constants, episodes(BATCH, per=6), 0.01, seed=0) == pytest.approx(math.log(BATCH))


def test_infonce_of_a_wrong_critic_is_negative_and_of_a_flat_one_zero() -> None:
    x, y = normal(0, 400, 8), normal(1, 400, 8)
    assert infonce_bound(x, y, episodes(100), 0.05, seed=0) < -1
    assert infonce_bound(x, y, episodes(100), 1e6, seed=0) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="16 held-out episodes, not 15"):
        infonce_bound(x[:60], y[:60], episodes(15), 1.0, seed=0)


def test_alignment_sees_a_shared_signal_and_its_controls_do_not() -> None:
    weak, strong = (alignment(*related(0, signal), seed=0) for signal in (0.5, 2.0))
    assert set(weak) == {f"alignment/{name}{suffix}" for name in FIGURES for suffix in ("", "/permuted")}
    for name in FIGURES:
        assert 0.03 < weak[f"alignment/{name}"] < strong[f"alignment/{name}"]
        assert abs(strong[f"alignment/{name}/permuted"]) < 0.05
    assert strong["alignment/infonce"] < math.log(BATCH)


@pytest.mark.parametrize("seed", SEEDS)
def test_alignment_of_independent_rows_and_its_controls_are_near_zero(seed: int) -> None:
    figures = alignment(*related(seed, signal=0.0), seed)
    assert max(abs(value) for value in figures.values()) < 0.03


def test_what_episodes_have_in_common_raises_cka_and_its_control_alike() -> None:
    figures = alignment(*related(0, signal=0.0, cluster=1.0), seed=0)
    assert figures["alignment/cka"] > 0.1
    assert figures["alignment/cka"] == pytest.approx(figures["alignment/cka/permuted"], abs=0.03)
    assert max(abs(figures[f"alignment/{name}"]) for name in ("cosine", "r2", "infonce")) < 0.03


def test_alignment_is_repeatable_and_heeds_neither_the_numbering_nor_float32() -> None:
    z, target, episode = related(0, signal=1.0)
    figures = alignment(z, target, episode, seed=3)
    assert alignment(z, target, 10 * episode + 5, seed=3) == figures
    assert alignment(z.float(), target.float(), episode, seed=3) == pytest.approx(figures, abs=1e-5)
    other = alignment(z, target, episode, seed=4)
    assert other["alignment/cka"] == figures["alignment/cka"]
    assert other["alignment/cka/permuted"] != figures["alignment/cka/permuted"]
    assert other["alignment/infonce"] == pytest.approx(figures["alignment/infonce"], abs=0.05)


def test_alignment_takes_episodes_of_unequal_length_in_any_order() -> None:
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([1, 2, 3, 14]).repeat(20)
    episode = torch.arange(80).repeat_interleave(lengths)[order]
    z = normal(0, 400, 6)
    figures = alignment(z, z @ normal(1, 6, 12), episode, seed=0)
    assert figures["alignment/cosine"] > 0.999
    assert abs(figures["alignment/cosine/permuted"]) < 0.1


def test_too_few_episodes_are_refused() -> None:
    z, target, _ = related(0, signal=1.0)
    with pytest.raises(ValueError, match="needs 32 episodes, not 30"):
        alignment(z, target, episodes(30, per=10), seed=0)
    with pytest.raises(ValueError, match="needs 4 episodes, not 3"):
        ridge_alignment(z, target, episodes(3, per=100))
    with pytest.raises(ValueError, match="more than half of the rows, not 200 of 300"):
        alignment(z, target, torch.arange(300).clamp(min=199), seed=0)
    with pytest.raises(ValueError, match="300, 299 and 300 rows"):
        ridge_alignment(z, target[1:], episodes(75))


def test_information_of_a_known_table() -> None:
    table = torch.tensor([[30, 10], [5, 55]])
    codes = torch.tensor([0, 0, 1, 1]).repeat_interleave(table.flatten())[:, None]
    actions = torch.tensor([-0.3, 4.0, -0.3, 4.0]).repeat_interleave(table.flatten())[:, None]
    share = table.double() / 100
    truth = float((share * (share / share.sum(1, keepdim=True) / share.sum(0)).log()).sum())
    found = plugin_mutual_information(codes, actions, torch.arange(100), codebook=2, bins=2, seed=0)
    assert found.nats == pytest.approx(truth)
    assert 0 < found.permuted_mean < 0.02
    entropy = -(0.35 * math.log(0.35) + 0.65 * math.log(0.65))
    assert found.normalised == pytest.approx(found.corrected / entropy)
    assert found.corrected == found.nats - found.permuted_mean


def test_codes_that_are_the_binned_actions_say_all_of_their_entropy() -> None:
    actions = torch.randperm(512, generator=torch.Generator().manual_seed(0))[:, None].double()
    codes = torch.cat([torch.zeros(512, 1), actions // 64], 1).long()
    # A constant action is left out, and the slot that says nothing does not stand for the other.
    found = plugin_mutual_information(codes, torch.cat([actions, torch.ones(512, 1)], 1), episodes(128), codebook=32, bins=8, seed=0)
    assert found.nats == pytest.approx(math.log(8))
    assert 0.95 < found.normalised < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_independent_codes_say_nothing_once_corrected(seed: int) -> None:
    codes = torch.randint(32, (512, 2), generator=torch.Generator().manual_seed(seed))
    found = plugin_mutual_information(codes, normal(seed, 512, 4), episodes(128), codebook=32, bins=8, seed=seed)
    assert found.nats > 0.2
    assert abs(found.corrected) < 0.05
    assert abs(found.corrected) < 4 * found.permuted_std
    assert abs(found.normalised) < 0.03


def test_codes_and_actions_constant_in_each_episode_say_nothing_once_corrected() -> None:
    # Rows of one episode count once: permuted row by row, the control would be several times too low.
    episode = episodes(64, per=8)
    codes = torch.randint(8, (64, 1), generator=torch.Generator().manual_seed(0))[episode]
    found = plugin_mutual_information(codes, normal(0, 64, 4)[episode], episode, codebook=8, bins=8, seed=0)
    assert found.permuted_mean > 0.3
    assert abs(found.corrected) < 0.1


def test_slots_that_speak_only_together_are_read_together_where_rows_suffice() -> None:
    codes = torch.randint(2, (512, 2), generator=torch.Generator().manual_seed(0))
    actions = (codes[:, :1] ^ codes[:, 1:]).double()
    joint = plugin_mutual_information(codes, actions, episodes(128), codebook=2, bins=2, seed=0)
    assert joint.normalised > 0.98
    apart = plugin_mutual_information(codes, actions, episodes(128), codebook=32, bins=2, seed=0)
    assert abs(apart.normalised) < 0.02


def test_actions_that_do_not_vary_have_nothing_to_say() -> None:
    codes = torch.randint(8, (64, 2), generator=torch.Generator().manual_seed(0))
    found = plugin_mutual_information(codes, torch.ones(64, 3), episodes(16), codebook=8, bins=4, seed=0)
    assert (found.nats, found.permuted_mean, found.permuted_std, found.normalised) == (0, 0, 0, 0)
    assert true_action_perplexity(torch.ones(64, 3), bins=4) == 1


def test_perplexity_of_actions_tells_even_from_uneven_ones() -> None:
    even = torch.linspace(-2, 5, 4001)[:, None]
    assert true_action_perplexity(even, bins=8) == pytest.approx(8, abs=0.02)
    # Ninety in a hundred stand still.
    still = torch.where(torch.arange(4001)[:, None] % 10 > 0, 0.0, even)
    assert true_action_perplexity(still, bins=8) < 2
    grip = (torch.arange(1000)[:, None] < 4).float()
    shares = torch.tensor([0.004, 0.996])
    assert true_action_perplexity(grip, bins=8) == pytest.approx(float((-shares * shares.log()).sum().exp()), abs=1e-5)
    both = true_action_perplexity(torch.cat([even[:1000], grip, torch.ones(1000, 1)], 1), bins=8)
    assert both == pytest.approx(math.sqrt(8 * true_action_perplexity(grip, bins=8)), abs=0.02)


def test_modulation_shares_by_hand() -> None:
    figures = modulation_share(torch.tensor([1.0, 0.0, 3.0, 0.0]), torch.tensor([3.0, 2.0, 0.0, 0.0]))
    assert figures == {
        "modulation_share": 0.3125,
        "modulation_share/block0": 0.25,
        "modulation_share/block1": 0.0,
        "modulation_share/block2": 1.0,
        "modulation_share/block3": 0.0,
    }


def test_gradients_by_hand() -> None:
    flow, other = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])], [torch.tensor([[0.0, 5.0]]), torch.tensor([12.0])]
    figures = gradient_agreement(flow, other)
    assert figures == pytest.approx({"gradient_norm/flow": 5, "gradient_norm/other": 13, "gradient_cosine": 48 / 65})
    assert gradient_agreement(flow, [-2 * part for part in flow])["gradient_cosine"] == pytest.approx(-1)
    assert gradient_agreement(flow, [0 * part for part in flow]) == {"gradient_norm/flow": 5, "gradient_norm/other": 0}
    assert "gradient_cosine" not in gradient_agreement(flow, [torch.full_like(part, math.nan) for part in flow])
    tiny = [1e-30 * part for part in flow]
    assert gradient_agreement(tiny, tiny)["gradient_cosine"] == pytest.approx(1)
    with pytest.raises(ValueError, match="different parameters"):
        gradient_agreement(flow, flow[:1])
