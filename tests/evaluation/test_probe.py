from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_dist.config import BottleneckConfig, ConditioningConfig, LamConfig
from cola_dist.evaluation.probe import code_features, difference_features, probe_with_controls, ridge_probe, untrained_lam
from cola_dist.recipes import tiny


def rows(noise: float, episodes: int = 20, per: int = 30) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(episodes * per, 6, generator=generator)
    actions = features @ torch.randn(6, 3, generator=generator) + noise * torch.randn(episodes * per, 3, generator=generator)
    episode = torch.arange(episodes).repeat_interleave(per)
    return 5 * features + 2, 0.01 * actions - 7, episode, episode >= 15


def test_a_linear_relation_is_found_whatever_the_units() -> None:
    score = ridge_probe(*rows(noise=0.0))
    assert score.r2 > 0.999
    assert score.l1 < 0.01


def test_noise_takes_its_share() -> None:
    features, actions, episode, heldout = rows(noise=2.0)
    scores = probe_with_controls({"codes": features, "constant": torch.ones_like(features)}, actions, episode, heldout, seed=0)
    assert 0.3 < scores["codes"].r2 < 0.8
    assert abs(scores["permuted"].r2) < 0.05
    assert scores["constant"].r2 == pytest.approx(0, abs=0.02)
    assert scores["codes"].l1 < scores["permuted"].l1


def test_many_useless_features_are_punished_by_the_penalty(monkeypatch: pytest.MonkeyPatch) -> None:
    features, actions, episode, heldout = rows(noise=1.0, episodes=8, per=20)
    heldout = episode >= 6
    wide = torch.cat([features, torch.randn(len(features), 100, generator=torch.Generator().manual_seed(1))], 1)
    assert ridge_probe(wide, actions, episode, heldout).r2 > 0.2
    monkeypatch.setattr("cola_dist.evaluation.probe.PENALTIES", (1e-6,))
    assert ridge_probe(wide, actions, episode, heldout).r2 < 0


def test_an_action_that_never_varies_is_left_out() -> None:
    features, actions, episode, heldout = rows(noise=0.0)
    assert ridge_probe(features, torch.cat([actions, torch.full_like(actions, 3.0)], 1), episode, heldout).r2 > 0.999


def test_too_little_data_is_refused() -> None:
    features, actions, episode, heldout = rows(noise=0.0)
    with pytest.raises(ValueError, match="two fitted episodes and a held-out row, not 20 and 0"):
        ridge_probe(features, actions, episode, torch.zeros_like(heldout))
    with pytest.raises(ValueError, match="not 1 and 570"):
        ridge_probe(features, actions, episode, episode > 0)


def test_features_of_clips() -> None:
    base = tiny()
    config = replace(base, lam=LamConfig(width=16, depth=1, heads=2, tokens=2), conditioning=ConditioningConfig(depth=1, width=16, heads=2))
    video = torch.randint(0, 256, (70, 5, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    lam = untrained_lam(config, video)
    features = code_features(lam, video)
    assert features.shape == (280, 64)
    torch.testing.assert_close(features, code_features(lam, video, batch=7))
    codes = lam.infer(video.float() / 127.5 - 1)[1].codes
    assert torch.equal(features.reshape(70, 4, 2, 32).argmax(-1), codes)
    assert float(features.sum()) == codes.numel()
    assert len(lam.infer(video[:1].float() / 127.5 - 1)[1].codes.unique()) > 1
    assert torch.equal(features, code_features(untrained_lam(config, video), video))


def test_features_without_a_codebook() -> None:
    base = tiny()
    video = torch.randint(0, 256, (40, 3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grid = replace(base, lam=LamConfig(width=16, depth=1, heads=2, bottleneck=BottleneckConfig(kind="fsq", codes=15)))
    features = code_features(untrained_lam(grid, video), video)
    assert features.shape == (80, 2 * 15)
    assert int(features.any(0).sum()) > 12, "z of random weights hardly vary, and still use many codes"
    free = replace(base, lam=LamConfig(width=16, depth=1, heads=2, bottleneck=BottleneckConfig(kind="continuous", dim=6)))
    lam = untrained_lam(free, video)
    torch.testing.assert_close(code_features(lam, video, batch=7), lam.idm(video.float() / 127.5 - 1).detach().reshape(80, 12))


def test_difference_features_are_signed_changes_per_cell() -> None:
    video = torch.zeros(2, 3, 3, 16, 16, dtype=torch.uint8)
    video[0, 1, 0, :2, :2] = 255
    features = difference_features(video, grid=8)
    assert features.shape == (4, 3 * 64)
    assert features[0].nonzero().flatten().tolist() == [0]
    assert float(features[0, 0]) == pytest.approx(2.0)
    assert float(features[1, 0]) == pytest.approx(-2.0)
    assert not features[2:].any()
