"""The model of large runs: its simulation against a closed form where that is exact, and the way in which its figures must go."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from dataclasses import replace

import pytest

from cola_dist.recipes import build_recipe
from cola_dist.train.estimate import PhasePlan, Plan, traffic_bytes
from tests.bench import failures, scale

HOUR = 3600.0
# Steps of a second, a checkpoint every ten minutes that takes six seconds and counts at once, a minute to start again, for five days.
JOB = failures.Job(430_000, 1.0, 600, 6.0, 0.0, 60.0, 0.0, 10**9)


def mean_wall(job: object, mtbf_s: float, trials: int = 60) -> float:
    draw = random.Random(1)
    return statistics.fmean(failures.simulate(job, mtbf_s, draw).wall_s for _ in range(trials))


def goodput(job: object, mtbf_s: float, trials: int = 60) -> float:
    found: float = failures.goodput(job, mtbf_s, trials)["simulated"]
    return found


@pytest.mark.parametrize("mtbf_s", [0.2 * HOUR, HOUR, 6 * HOUR, 48 * HOUR])
def test_the_simulation_agrees_with_the_closed_form_where_that_is_exact(mtbf_s: float) -> None:
    assert mean_wall(JOB, mtbf_s) == pytest.approx(failures.daly_wall_s(JOB, mtbf_s), rel=0.01)


def test_without_failures_only_checkpoints_cost() -> None:
    wall = mean_wall(JOB, 1e15, trials=1)
    assert wall == pytest.approx(JOB.steps * JOB.step_s + math.ceil(JOB.steps / JOB.every) * JOB.blocked_s)


def test_asynchronous_writes_are_near_the_closed_form_while_failures_are_rare() -> None:
    job = replace(JOB, write_s=120.0)
    assert mean_wall(job, 24 * HOUR) == pytest.approx(failures.daly_wall_s(job, 24 * HOUR), rel=0.01)
    assert mean_wall(job, HOUR) > mean_wall(JOB, HOUR), "what does not count yet is lost"


def test_goodput_falls_with_all_that_should_lower_it() -> None:
    by_mtbf = [goodput(JOB, hours * HOUR) for hours in (0.25, 1, 6, 48)]
    assert by_mtbf == sorted(by_mtbf)
    assert by_mtbf[0] < 0.7 < 0.95 < by_mtbf[-1] < 1
    worse = ({"restart_s": 600.0}, {"restart_per_step_s": 0.002}, {"write_s": 300.0}, {"every": 6000}, {"every": 10}, {"max_restarts": 3})
    for change in worse:
        assert goodput(replace(JOB, **change), HOUR) < goodput(JOB, HOUR) - 0.01, change


def test_the_advised_interval_is_youngs_and_near_the_best() -> None:
    every = failures.best_interval(JOB, 6 * HOUR)
    assert every == math.ceil(math.sqrt(2 * JOB.blocked_s * 6 * HOUR))
    walls = {steps: failures.daly_wall_s(replace(JOB, every=steps), 6 * HOUR) for steps in range(50, 5000, 10)}
    assert failures.daly_wall_s(replace(JOB, every=every), 6 * HOUR) < 1.001 * min(walls.values())
    assert failures.best_interval(replace(JOB, write_s=1000.0), 6 * HOUR) == 4000, "writing is never most of what storage does"


def test_a_person_is_called_once_restarts_are_used_up_and_a_hopeless_run_is_given_up() -> None:
    few = failures.goodput(replace(JOB, max_restarts=3), 6 * HOUR, 60)
    assert few["calls"] == pytest.approx(few["failures"] / 4, abs=0.5), "the fourth failure ends the job"
    assert failures.goodput(JOB, 6 * HOUR, 60)["calls"] == 0
    assert failures.goodput(replace(JOB, every=60_000), HOUR, 3)["simulated"] == 0


@pytest.fixture(scope="module")
def sizes() -> list[object]:
    """The recipe `opensora` with the planner's figures in round numbers: to count them takes half a minute."""
    parameters = {"lam": 116_000_000, "conditioning": 74_000_000, "world": 904_000_000}
    phases = [
        PhasePlan(name, trains, {"forward": 1.3e15, "backward": 1.1e15}, 9 * 10**9, {}, (0, 0, 0, 0), (0, 0, 0, 0))
        for name, trains in (("warmup", ("lam", "conditioning")), ("joint", ("lam", "conditioning", "world")))
    ]
    plan = Plan(parameters, tuple(phases), 12 * sum(parameters.values()))
    return [scale.Size(build_recipe("opensora"), plan, gpus) for gpus in scale.GPUS]


def test_load_follows_the_number_of_gpus(sizes: list[object]) -> None:
    rows = [scale.row(size, trials=5) for size in sizes]
    for one, more in itertools.pairwise(rows):
        times = more["gpus"] / one["gpus"]
        assert 0.8 * times < more["data"]["storage_requests_per_s"] / one["data"]["storage_requests_per_s"] <= times
        assert more["control"]["mlflow_points_per_s"] <= one["control"]["mlflow_points_per_s"], "rank 0 alone speaks to MLflow"
        assert more["checkpoint"]["bytes"] == one["checkpoint"]["bytes"], "all ranks together write one state"
        assert more["restart_s"]["recipe"] > one["restart_s"]["recipe"]
        for days in ("1", "7", "30"):
            better, worse = (row["goodput_by_mtbf_days"][days] for row in (one, more))
            assert worse["advised"]["closed_form"] < better["advised"]["closed_form"]
            assert worse["advised"]["simulated"] < better["advised"]["simulated"] + 0.002, "five runs are few"
            assert worse["recipe"]["simulated"] <= worse["advised"]["simulated"] + 0.002
            assert worse["advised"]["calls"] < 0.5
    assert len(scale.tables(rows).splitlines()) == (2 + 4) + 1 + (2 + 12)


def test_traffic_is_the_planners_and_hierarchies_never_send_more_between_nodes(sizes: list[object]) -> None:
    trained = 1_094_000_000
    for size in sizes:
        sent = size.traffic()
        assert [stage["flat"] for stage in sent] == list(traffic_bytes(trained, 0, size.gpus, 4))
        for stage in sent:
            assert stage["hierarchical_network"] <= stage["flat_network"] * (1 + 1e-9)
            assert (stage["flat_network"] > 0) == (size.nodes > 1)
        assert sent[3]["hierarchical_network"] < 0.2 * sent[3]["flat_network"] or size.nodes == 1
