from __future__ import annotations

from dataclasses import replace

import torch
from method_parts import part

from cola_dist.config import RunConfig
from cola_dist.methods import Clips, build_method, phases
from cola_dist.methods.draws import Draws
from cola_dist.methods.pretrain import Pretrain


def test_co_training_is_warm_up_then_joint(config: RunConfig) -> None:
    warmup, joint = phases(config)
    assert (warmup.name, warmup.trains, warmup.lr, warmup.steps) == (
        "warmup",
        ("lam", "conditioning"),
        {"lam": 1e-3, "conditioning": 1e-3},
        3,
    )
    assert (joint.name, joint.trains, joint.lr, joint.steps) == (
        "joint",
        ("lam", "conditioning", "world"),
        {"lam": 1e-3, "conditioning": 1e-3, "world": 1e-3},
        2,
    )


def test_a_phase_of_no_steps_is_left_out(config: RunConfig) -> None:
    assert [phase.name for phase in phases(replace(config, warmup=replace(config.warmup, steps=0)))] == ["joint"]


def test_pretraining_is_one_phase_of_the_generator_that_learns(config: RunConfig, clips: Clips) -> None:
    config = replace(config, method="pretrain")
    (phase,) = phases(config)
    assert (phase.trains, phase.steps) == (("world",), 2)
    method = build_method(config, bf16=False)
    assert isinstance(method, Pretrain)
    method.set_phase(phase)
    optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    before = method.evaluate(clips)
    for step in range(30):
        optimizer.zero_grad()
        method(clips, step).loss.backward()
        optimizer.step()
    after = method.evaluate(clips)
    assert before["flow_count"].tolist() == [6.0] * 4
    assert float(after["flow_own"].sum()) < 0.9 * float(before["flow_own"].sum())


def test_draws_of_a_clip_do_not_depend_on_its_neighbours(config: RunConfig, clips: Clips) -> None:
    cpu = torch.device("cpu")
    together = Draws(3, clips.position, cpu)
    alone = Draws(3, part(clips, slice(4, 5)).position, cpu)
    assert torch.equal(together.normal("noise", 2, 3)[4], alone.normal("noise", 2, 3)[0])
    assert torch.equal(together.dropped(0.5, 64)[4], alone.dropped(0.5, 64)[0])
    assert not torch.equal(together.normal("noise", 2, 3), together.normal("rollout", 2, 3))


def test_draws_have_the_distribution_that_the_configuration_names(config: RunConfig) -> None:
    draws = Draws(0, torch.arange(4000), torch.device("cpu"))
    flow = replace(config.flow, tau_min=0.2, tau_shift=3.0)
    tau = draws.flow_time(flow)
    assert 0.2 <= float(tau.min()) < 0.22
    assert 0.98 < float(tau.max()) < 1
    # The median of u is one half, which the shift moves to s / (s + 1).
    assert abs(float(tau.median()) - (0.2 + 0.8 * 0.75)) < 0.02
    context = draws.context(flow, 5)
    assert context.bincount().tolist()[0] == 0
    assert all(abs(count - 1000) < 120 for count in context.bincount().tolist()[1:])
    assert draws.context(replace(flow, context_max=1), 5).unique().tolist() == [1]
    assert abs(float(draws.dropped(0.1, 4).float().mean()) - 0.1) < 0.01
