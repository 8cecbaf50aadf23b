from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cola_dist.config import DiagnosticsConfig
from cola_dist.diagnostics import Monitor

K = 8


def code_sums(counts: torch.Tensor, z: torch.Tensor) -> dict[str, torch.Tensor]:
    z = z.double()
    return {"code_counts": counts.double(), "z_count": torch.tensor(float(len(z))), "z_sum": z.sum(0), "z_outer": z.T @ z}


def flow_sums(own: list[float], shuffled: list[float], null: list[float], count: list[int]) -> dict[str, torch.Tensor]:
    named = {"flow_own": own, "flow_shuffled": shuffled, "flow_null": null, "flow_count": count}
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in named.items()}


def spread(rows: int = 4000, dim: int = 6, rank: int = 6) -> torch.Tensor:
    z = torch.zeros(rows, dim)
    z[:, :rank] = torch.randn(rows, rank, generator=torch.Generator().manual_seed(0))
    return z


def indicators(sums: dict[str, torch.Tensor]) -> dict[str, float]:
    return Monitor(DiagnosticsConfig(), K).indicators(sums)


LISTENING = flow_sums([10.0] * 4, [11.0] * 4, [12.0] * 4, [10] * 4)


def test_the_loss_of_a_repeated_frame_is_a_mean_over_the_bins_with_clips() -> None:
    sums = flow_sums([10.0, 20.0, 0.0, 0.0], [0.0] * 4, [0.0] * 4, [10, 10, 0, 0])
    assert "copy_loss" not in indicators(sums)
    figures = indicators(sums | {"flow_copy": torch.tensor([30.0, 50.0, 0.0, 0.0])})
    assert (figures["copy_loss"], figures["copy_loss/tau0"], figures["copy_loss/tau1"]) == (4, 3, 5)
    assert "copy_loss/tau2" not in figures


def test_uniform_codes() -> None:
    figures = indicators(code_sums(torch.full((2, K), 5), spread()))
    assert figures["utilisation"] == 1
    assert figures["max_usage"] == pytest.approx(1 / K)
    assert figures["entropy"] == pytest.approx(math.log(K))
    assert figures["perplexity"] == pytest.approx(K)


def test_one_code() -> None:
    counts = torch.zeros(2, K)
    counts[:, 3] = 9
    figures = indicators(code_sums(counts, spread()))
    assert figures["utilisation"] == pytest.approx(1 / K)
    assert (figures["max_usage"], figures["entropy"], figures["perplexity"]) == (1, 0, 1)


def test_slots_are_told_apart_and_averaged() -> None:
    counts = torch.zeros(2, K)
    counts[0, :4] = 1
    counts[1, 0] = 4
    joint = torch.zeros(K * K)
    joint[:4] = 1
    figures = indicators(code_sums(counts, spread()) | {"joint_counts": joint})
    assert (figures["perplexity/slot0"], figures["perplexity/slot1"]) == (pytest.approx(4), pytest.approx(1))
    assert figures["perplexity"] == pytest.approx(2.5)
    assert figures["utilisation/slot0"] == 0.5
    assert figures["perplexity/joint"] == pytest.approx(4)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_known_rank_and_shift(rank: int) -> None:
    figures = indicators(code_sums(torch.ones(1, K), spread(rank=rank) + 100.0))
    assert figures["effective_rank"] == pytest.approx(rank, rel=0.01)
    assert figures["z_std"] == pytest.approx(rank / 6, rel=0.05)
    assert figures["z_variance_hinge"] == pytest.approx(1 - rank / 6, abs=0.05)
    assert figures["z_offdiag_cov"] < 0.01


def test_z_that_does_not_vary_has_no_rank() -> None:
    figures = indicators(code_sums(torch.ones(1, K), torch.full((50, 6), 0.1)))
    assert figures["effective_rank"] == 0
    assert figures["z_std"] == pytest.approx(0, abs=1e-6)
    assert figures["z_variance_hinge"] == pytest.approx(1)


def test_correlated_dimensions_show_in_the_covariance() -> None:
    column = spread(dim=1, rank=1)
    figures = indicators(code_sums(torch.ones(1, K), column.expand(-1, 4)))
    assert figures["effective_rank"] == pytest.approx(1, abs=1e-3)
    assert figures["z_offdiag_cov"] == pytest.approx(4 * 3 / 4, rel=0.1)


def test_gap_is_a_mean_over_bins_that_were_measured() -> None:
    figures = indicators(flow_sums([2.0, 8.0, 0.0, 3.0], [2.0, 12.0, 0.0, 4.0], [3.0, 8.0, 0.0, 3.0], [2, 4, 0, 1]))
    assert figures["flow_loss"] == pytest.approx((1 + 2 + 3) / 3)
    assert figures["sensitivity_gap"] == pytest.approx((0 + 1 + 1) / 3)
    assert figures["sensitivity_gap_null"] == pytest.approx(0.5 / 3)
    assert figures["sensitivity_gap/tau1"] == pytest.approx(1)
    assert "sensitivity_gap/tau2" not in figures


def test_pretraining_has_flow_figures_only() -> None:
    sums = {name: LISTENING[name] for name in ("flow_own", "flow_count")}
    assert set(indicators(sums)) == {"flow_loss", "flow_loss/tau0", "flow_loss/tau1", "flow_loss/tau2", "flow_loss/tau3"}


HEALTHY = {"perplexity": 4.0, "effective_rank": 5.0, "max_usage": 0.3, "flow_loss": 0.5, "sensitivity_gap": 0.05}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, "healthy"),
        ({"perplexity": 1.5}, "at risk"),
        ({"perplexity": 0.79}, "collapsed"),
        ({"effective_rank": 2.9}, "at risk"),
        ({"effective_rank": 1.4}, "collapsed"),
        ({"max_usage": 0.7}, "at risk"),
        ({"max_usage": 0.95}, "collapsed"),
        ({"sensitivity_gap": 0.004}, "at risk"),
        ({"sensitivity_gap": 0.0}, "collapsed"),
        ({"sensitivity_gap": -0.01}, "collapsed"),
        ({"perplexity": 1.5, "sensitivity_gap": 0.0}, "collapsed"),
    ],
)
def test_verdict_is_the_worst_of_all(change: dict[str, float], expected: str) -> None:
    assert Monitor(DiagnosticsConfig(), K).verdict(HEALTHY | change) == expected


def test_without_codes_rank_and_sensitivity_decide() -> None:
    sums = code_sums(torch.ones(1, K), spread()) | LISTENING
    del sums["code_counts"]
    figures = indicators(sums)
    assert figures["effective_rank"] == pytest.approx(6, rel=0.01)
    assert not {"perplexity", "max_usage", "entropy", "utilisation"} & set(figures)
    monitor = Monitor(DiagnosticsConfig(), 0)
    assert monitor.verdict(figures) == "healthy"
    assert monitor.verdict(figures | {"sensitivity_gap": 0.0}) == "collapsed"
    assert monitor.verdict(figures | {"effective_rank": 2.9}) == "at risk"


def test_thresholds_come_from_the_configuration() -> None:
    strict = replace(DiagnosticsConfig(), min_gap=0.2)
    assert Monitor(strict, K).verdict(HEALTHY) == "collapsed"
    unmeasured = {name: value for name, value in HEALTHY.items() if name not in ("flow_loss", "sensitivity_gap")}
    assert Monitor(strict, K).verdict(unmeasured) == "healthy"
