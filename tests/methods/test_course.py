"""The phases of a run as they come to be run: ends moved up, returns, and what a checkpoint keeps of them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.config import RunConfig
from cola_dist.methods import Course, Phase, phases
from cola_dist.recipes import tiny

WARMUP = Phase("warmup", ("lam", "conditioning"), {"lam": 1e-3, "conditioning": 1e-3}, 30)
JOINT = Phase("joint", ("lam", "conditioning", "world"), {"lam": 1e-3, "conditioning": 1e-3, "world": 1e-4}, 70)
RETURN = replace(WARMUP, steps=10)


def names(course: Course) -> list[tuple[str, int, int]]:
    return [(span.phase.name, span.first, span.end) for span in course.spans]


def test_the_plan() -> None:
    course = Course((WARMUP, JOINT))
    assert names(course) == [("warmup", 0, 30), ("joint", 30, 100)]
    assert course.at(29).phase == WARMUP
    assert course.at(30).phase == JOINT
    assert course.at(100) is None


def test_what_follows_an_early_end_moves_up() -> None:
    course = Course((WARMUP, JOINT))
    course.finish_phase(12, "settled")
    assert names(course) == [("warmup", 0, 12), ("joint", 12, 82)]
    assert course.spans[0].why == "settled"


def test_a_return_takes_its_steps_from_the_phase_that_it_interrupts() -> None:
    course = Course((WARMUP, JOINT))
    course.return_to(RETURN, 50, "collapsed")
    assert names(course) == [("warmup", 0, 30), ("joint", 30, 50), ("warmup-2", 50, 60), ("joint-2", 60, 100)]
    assert course.returns("warmup") == 1
    assert course.at(55).phase.trains == WARMUP.trains
    assert course.at(60).phase.lr == JOINT.lr
    course.return_to(RETURN, 95, "again")
    assert names(course)[-2:] == [("joint-2", 60, 95), ("warmup-3", 95, 100)], "no step is left to go on with"


def test_a_run_may_end_early() -> None:
    course = Course((WARMUP, JOINT))
    course.finish_run(20, "spent")
    assert names(course) == [("warmup", 0, 20)]
    assert course.at(20) is None


@settings(deadline=None)
@given(st.data())
def test_no_change_makes_a_run_longer_or_leaves_a_gap_and_all_is_restored(data: st.DataObject) -> None:
    course, step = Course((WARMUP, JOINT)), 0
    for _ in range(data.draw(st.integers(0, 4))):
        if step + 1 >= course.end:
            break
        step = data.draw(st.integers(step + 1, course.end - 1))
        if data.draw(st.booleans()):
            course.finish_phase(step, "end")
        else:
            course.return_to(RETURN, step, "return")
        assert course.end <= 100
    covered = [place for span in course.spans for place in range(span.first, span.end)]
    assert covered == list(range(course.end))
    assert len({span.phase.name for span in course.spans}) == len(course.spans)
    if course.at(step) is not None:
        restored = Course((WARMUP, JOINT))
        restored.restore(json.loads(json.dumps(course.state())), step)
        assert [span.phase for span in restored.spans] == [span.phase for span in course.spans]
        assert names(restored)[:-1] == names(course)[:-1]


def test_a_resumed_run_may_be_prolonged_and_a_spent_one_reopened() -> None:
    course = Course((WARMUP, JOINT))
    state = course.state()
    longer = Course((WARMUP, replace(JOINT, steps=90)))
    longer.restore(state, 100)
    assert names(longer) == [("warmup", 0, 30), ("joint", 30, 120)]
    course.finish_run(40, "spent")
    again = Course((WARMUP, JOINT))
    again.restore(course.state(), 40)
    assert names(again) == [("warmup", 0, 30), ("joint", 30, 100)]
    assert again.spans[-1].why == ""


@pytest.fixture
def config() -> RunConfig:
    return tiny()


def test_a_role_trains_where_its_rate_is_above_0(config: RunConfig) -> None:
    frozen = replace(config, joint=replace(config.joint, lr_lam=0.0))
    assert phases(frozen)[1].trains == ("conditioning", "world")
    alone = replace(config, lam_phase=replace(config.lam_phase, steps=5))
    first = phases(alone)[0]
    assert (first.name, first.trains, first.objective) == ("lam", ("lam",), "forward")
