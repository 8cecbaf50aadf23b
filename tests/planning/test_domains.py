from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cola_dist.errors import UserError
from cola_dist.planning.domains import Domain, open_domain
from cola_dist.planning.domains.robodesk import TASKS, RoboDeskDomain


def play(domain: Domain, actions: np.ndarray) -> list[np.ndarray]:
    return [domain.step(action) for action in actions]


@pytest.fixture
def square() -> Domain:
    return open_domain("square", "")


def test_an_episode_follows_from_its_seed_and_actions(square: Domain) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (5, 2))
    first = square.reset(3)
    seen = play(square, actions)
    other = open_domain("square", "reach")
    assert np.array_equal(other.reset(3), first)
    assert np.array_equal(other.goal(), square.goal())
    assert all(np.array_equal(a, b) for a, b in zip(play(other, actions), seen, strict=True))
    assert not np.array_equal(square.reset(4), first)


def test_a_state_goes_on_in_another_instance(square: Domain) -> None:
    actions = np.random.default_rng(1).uniform(-1, 1, (4, 2))
    square.reset(7)
    square.step(actions[0])
    state = square.get_state()
    seen = play(square, actions)
    twin = open_domain("square", "")
    twin.reset(7)
    twin.set_state(state)
    assert all(np.array_equal(a, b) for a, b in zip(play(twin, actions), seen, strict=True))
    square.set_state(state)
    assert np.array_equal(square.step(actions[0]), seen[0])


def test_going_straight_to_the_goal_is_success(square: Domain) -> None:
    square.reset(5)
    assert not square.success()
    for _ in range(12):
        state: Any = square.get_state()
        square.step((square._goal - state.place) / 10)  # type: ignore[attr-defined]
    assert square.success()
    assert square.distance() == 0


def test_frames_are_labelled_where_a_frame_tells() -> None:
    corner = open_domain("square", "corner")
    frames, done = corner.labelled(20, seed=0)
    assert frames.shape == (20, 64, 64, 3)
    assert done.sum() == 10
    with pytest.raises(UserError, match=r"another goal in each episode.*choose corner"):
        open_domain("square", "reach").labelled(4, seed=0)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown domain 'sqare', did you mean 'square'\?; there are: square, robodesk"):
        open_domain("sqare", "")
    with pytest.raises(UserError, match=r"unknown task 'push_rd' of robodesk, did you mean 'push_red'\?"):
        open_domain("robodesk", "push_rd")


def test_a_missing_simulator_is_named_with_its_extra_and_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "robodesk", None)
    for name in ("gym", "gymnasium"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    with pytest.raises(
        UserError, match=r"robodesk is missing \(robodesk\): pip install 'cola-dist\[robodesk\]' and apt-get install libegl1"
    ):
        open_domain("robodesk", "push_red")


def test_opengl_that_does_not_start_is_named_with_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def headless(**_: Any) -> None:
        raise RuntimeError("no display")

    monkeypatch.setitem(sys.modules, "robodesk", SimpleNamespace(RoboDesk=headless))
    for name in ("gym", "gymnasium"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(UserError, match=r"MUJOCO_GL=glfw \(no display\): apt-get .*set MUJOCO_GL=egl"):
        open_domain("robodesk", "push_red")


@pytest.mark.skipif(importlib.util.find_spec("robodesk") is None, reason="the simulator is an extra")
@pytest.mark.parametrize("task", TASKS)
def test_robodesk_goes_on_from_a_state_bit_for_bit(task: str) -> None:
    domain, twin = RoboDeskDomain(task), RoboDeskDomain(task)
    actions = np.random.default_rng(0).uniform(-1, 1, (2, 5))
    first = domain.reset(5)
    assert np.array_equal(first, twin.reset(5))
    assert not np.array_equal(first, domain.goal())
    assert not domain.success()
    domain.step(actions[0])
    twin.set_state(domain.get_state())
    assert np.array_equal(domain.step(actions[1]), twin.step(actions[1]))
    assert np.array_equal(domain.get_state().qpos, twin.get_state().qpos)
