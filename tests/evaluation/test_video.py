"""Video metrics against independent implementations, and the networks that some of them need."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import av
import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from cola_dist.errors import UserError
from cola_dist.evaluation import video
from cola_dist.evaluation.networks import MetricNetwork, identify
from tests.evaluation.networks import Distance, fvd_network, lpips_network, save

REAL = os.environ.get("COLA_REAL_VIDEOS", "")
"""A folder with any videos, to be measured as well."""


def plain_psnr(frames: np.ndarray, truth: np.ndarray) -> float:
    errors = ((frames.astype(np.float64) - truth) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / errors)))


def plain_ssim(frames: np.ndarray, truth: np.ndarray) -> float:
    """Wang et al. 2004 over windows of the picture and, at its edges, of its reflection."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = np.outer(line, line) / line.sum() ** 2

    def blurred(x: np.ndarray) -> np.ndarray:
        padded = np.pad(x, ((0, 0), (0, 0), (5, 5), (5, 5)), mode="reflect")
        windows = np.lib.stride_tricks.sliding_window_view(padded, (11, 11), axis=(-2, -1))
        return np.einsum("...ij,ij->...", windows, window)

    x, y = frames / 255.0, truth / 255.0
    mx, my = blurred(x), blurred(y)
    vx, vy, cov = blurred(x * x) - mx**2, blurred(y * y) - my**2, blurred(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mx * my + c1) * (2 * cov + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


def noisy_clips(clips: np.ndarray, spread: float = 12.0) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, spread, clips.shape)
    return np.clip(clips + noise, 0, 255).round().astype(np.uint8)


def real_clips() -> np.ndarray:
    clips = []
    for path in sorted(Path(REAL).iterdir()):
        if path.suffix in (".mp4", ".mkv", ".avi", ".gif"):
            with av.open(str(path)) as container:
                frames = [frame for frame, _ in zip(container.decode(video=0), range(3), strict=False)]
            clips.append(np.stack([frame.reformat(96, 64, "rgb24").to_ndarray().transpose(2, 0, 1) for frame in frames]))
    return np.stack(clips)


@pytest.mark.parametrize("kind", ["random", "real"])
def test_psnr_and_ssim_agree_with_plain_ones(kind: str) -> None:
    if kind == "real" and not REAL:
        pytest.skip("COLA_REAL_VIDEOS names no folder")
    truth = np.random.default_rng(0).integers(0, 256, (3, 4, 3, 24, 31), dtype=np.uint8) if kind == "random" else real_clips()
    frames = noisy_clips(truth)
    psnr, ssim = (metric(torch.tensor(frames), torch.tensor(truth), 1) for metric in (video.psnr, video.ssim))
    for clip in range(len(truth)):
        assert float(psnr[clip]) == pytest.approx(plain_psnr(frames[clip, 1:], truth[clip, 1:]), rel=1e-6)
        assert float(ssim[clip]) == pytest.approx(plain_ssim(frames[clip, 1:], truth[clip, 1:]), abs=1e-9)


def test_context_frames_do_not_count_and_a_perfect_frame_is_capped() -> None:
    truth = torch.randint(0, 256, (2, 4, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    broken = truth.clone()
    broken[:, :2] = 0
    assert video.psnr(broken, truth, 2).tolist() == [video.BEST_PSNR] * 2
    torch.testing.assert_close(video.ssim(broken, truth, 2), torch.ones(2, dtype=torch.float64))
    assert video.absolute_error(broken, truth, 2).tolist() == [0.0, 0.0]
    assert (video.psnr(broken, truth, 1) < 70).all()


@pytest.mark.parametrize(("rows", "width"), [(200, 20), (40, 40), (2000, 60)])
def test_frechet_distance_is_the_closed_form(rows: int, width: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    a, b = (torch.randn(rows + more, width, generator=generator, dtype=torch.float64) for more in (0, 7))
    a, b = a @ torch.randn(width, width, generator=generator, dtype=torch.float64), 0.3 + 2 * b
    means = [rows.mean(0).numpy() for rows in (a, b)]
    covariances = [np.cov(rows.numpy(), rowvar=False) for rows in (a, b)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    expected = ((means[0] - means[1]) ** 2).sum() + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * np.trace(root.real)
    assert video.frechet_distance(a, b) == pytest.approx(expected, rel=1e-4 if rows == width else 1e-9)


def test_frechet_distance_of_few_clips_and_of_equal_ones() -> None:
    a = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    scale = float(a.square().sum())
    assert video.frechet_distance(a, a) <= 1e-12 * scale
    assert video.frechet_distance(a, a + 0.5) == pytest.approx(100.0, rel=1e-5), "a shift by 0.5 in 400 features"
    # Two sets on orthogonal lines have no common part of a covariance: their traces remain.
    x, y = torch.zeros(3, 400), torch.zeros(3, 400)
    x[:, 0], y[:, 1] = torch.tensor([-1.0, 0.0, 1.0]), torch.tensor([-2.0, 0.0, 2.0])
    assert video.frechet_distance(x, y) == pytest.approx(1.0 + 4.0)
    with pytest.raises(ValueError, match="two rows"):
        video.frechet_distance(a[:1], a)


def load(metric: str, uri: str) -> MetricNetwork:
    file = identify(metric, uri, "")  # type: ignore[arg-type]
    return MetricNetwork(file, uri, torch.device("cpu"))


def clips(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_given_networks_are_asked_as_their_authors_do(tmp_path: Path) -> None:
    uri = fvd_network(tmp_path / "i3d.pt")
    network = load("FVD", uri)
    assert network.file.sha256 == hashlib.sha256(Path(uri).read_bytes()).hexdigest()
    assert network.file.name == "i3d.pt"
    features = video.fvd_features(network, clips())
    assert features.shape == (3, 400)
    torch.testing.assert_close(features[:1], video.fvd_features(network, clips()[:1]), rtol=1e-5, atol=1e-6)
    assert video.frechet_distance(features, video.fvd_features(network, clips(1))) > 0
    distance = load("LPIPS", lpips_network(tmp_path / "lpips.pt"))
    values = video.lpips(distance, clips(), clips(1), 1)
    torch.testing.assert_close(values, 2 * video.absolute_error(clips(), clips(1), 1), rtol=1e-5, atol=1e-6)


def test_networks_that_are_not_what_they_should_be_are_refused(tmp_path: Path) -> None:
    uri = fvd_network(tmp_path / "i3d.pt")
    with pytest.raises(UserError, match=r"missing\.pt is missing: give the file's path"):
        identify("FVD", str(tmp_path / "missing.pt"), "")
    with pytest.raises(UserError, match=r"i3d\.pt has sha256 [0-9a-f]{64}, not abc"):
        identify("FVD", uri, "abc")
    known = identify("FVD", uri, "")
    assert identify("FVD", uri, known.sha256.upper()) == known
    with pytest.raises(UserError, match="is another file here"):
        MetricNetwork(known, lpips_network(tmp_path / "lpips.pt"), torch.device("cpu"))
    (tmp_path / "weights.pt").write_bytes(b"no network")
    with pytest.raises(UserError, match="is no TorchScript file"):
        load("LPIPS", str(tmp_path / "weights.pt"))
    torch.save(Distance().state_dict(), tmp_path / "state.pt")
    with pytest.raises(UserError, match="is no TorchScript file"):
        load("LPIPS", str(tmp_path / "state.pt"))
    with pytest.raises(UserError, match=r"gave \[3, 7\] where \[3, 400\] is expected: it is another network"):
        video.fvd_features(load("FVD", fvd_network(tmp_path / "narrow.pt", 7)), clips())
    with pytest.raises(UserError, match="refuses"):
        video.fvd_features(load("FVD", save(Distance(), tmp_path / "distance.pt")), clips())
    with pytest.raises(UserError, match="refuses"):
        video.lpips(load("LPIPS", uri), clips(), clips(1), 1)
