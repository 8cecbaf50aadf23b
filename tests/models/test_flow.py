from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cola_dist.config import FlowConfig
from cola_dist.models.flow import flow_time, frame_times, noised, sample

PLAIN = FlowConfig(tau_min=0.0, tau_shift=1.0, sampler_steps=4)


def test_flow_time_of_known_points() -> None:
    u = torch.tensor([0.0, 0.5, 1.0])
    assert flow_time(u, PLAIN).tolist() == [0.0, 0.5, 1.0]
    assert flow_time(u, replace(PLAIN, tau_shift=3.0)).tolist() == pytest.approx([0.0, 0.75, 1.0])
    assert flow_time(u, FlowConfig(tau_min=0.5, tau_shift=3.0)).tolist() == pytest.approx([0.5, 0.875, 1.0])


def test_context_frames_are_clean() -> None:
    tau, generated = frame_times(torch.tensor([0.25, 0.5]), torch.tensor([1, 3]), 4)
    assert tau.tolist() == [[0.0, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 0.5]]
    assert generated.tolist() == [[False, True, True, True], [False, False, False, True]]
    x0, eps = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    x = noised(x0, eps, tau)
    assert torch.equal(x[1, :3], x0[1, :3])
    torch.testing.assert_close(x[1, 3], 0.5 * x0[1, 3] + 0.5 * eps[1, 3])


@pytest.mark.parametrize("flow", [PLAIN, FlowConfig(sampler_steps=7), FlowConfig(tau_min=0.4, sampler_steps=5)])
def test_the_sampler_follows_the_true_velocity_to_the_data(flow: FlowConfig) -> None:
    x0, noise = torch.randn(2, 4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)
    asked = []

    def velocity(x: torch.Tensor, tau: torch.Tensor) -> torch.Tensor:
        asked.append(tau)
        assert torch.equal(x[:, :1], x0[:, :1])
        assert not tau[:, 0].any()
        torch.testing.assert_close(x[:, 1:], noised(x0, noise, tau)[:, 1:], rtol=1e-3, atol=1e-4)
        return noise - x0

    torch.testing.assert_close(sample(velocity, x0[:, :1], noise, flow), x0, rtol=1e-3, atol=1e-4)
    times = [float(tau[0, 1]) for tau in asked]
    assert len(times) == flow.sampler_steps
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(1.0)
    assert min(times) > flow.tau_min
