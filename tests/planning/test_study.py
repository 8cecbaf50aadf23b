"""Episodes, and whole studies of them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from cola_dist.data.decode import probe_video
from cola_dist.errors import UserError
from cola_dist.planning.domains import open_domain
from cola_dist.planning.models import SimulatorModel
from cola_dist.planning.results import summary, write_results
from cola_dist.planning.study import RANDOM, SIMULATOR, Request, Setup, Worker, names_of, prepare, run_on_ray
from jobs import plan as job


def request(**changes: Any) -> Request:
    asked: dict[str, Any] = {
        **{"domain": "square", "task": "reach", "learned": (), "planner": "mppi", "episodes": 6, "seeds": (0,), "horizon": 8},
        **{"samples": 40, "simulator_samples": 0, "sampler_steps": 0, "at_once": 50},
    }
    return Request(**(asked | changes))


def test_plans_with_the_true_simulator_solve_the_square_and_random_actions_do_not(tmp_path: Path) -> None:
    setup = prepare(request(), with_classifier=False)
    worker = Worker(setup)
    episodes = [worker.run(model, 0, number) for model in setup.models for number in range(6)]
    found = summary(episodes, setup)
    assert found["models"][SIMULATOR]["successes"] >= 5
    assert found["models"][RANDOM]["successes"] <= 2
    (pair,) = found["pairs"]
    assert (pair["a"], pair["b"]) == (SIMULATOR, RANDOM)
    assert pair["difference"] >= 0.5
    assert found["models"][SIMULATOR]["plan_steps_per_s"] > 0
    assert all(set(e.parts) <= {"encode", "rollout", "objective", "simulator"} for e in episodes)

    places = write_results(str(tmp_path), found, episodes)
    rows = pq.read_table(io.BytesIO(Path(places["episodes.parquet"]).read_bytes())).to_pylist()
    assert [row["success"] for row in rows] == [e.success for e in episodes]
    assert json.loads((tmp_path / "results.json").read_text())["models"] == found["models"]
    frames, fps, width, height = probe_video((tmp_path / "videos" / "random-worst.mp4").read_bytes())
    # twice as large, beside the goal, a white line after each
    assert (frames, fps, height, width) == (16 + 5, 5.0, 2 * 64 + 2, 2 * (2 * 64 + 2))


def test_an_episode_does_not_depend_on_those_before_it_nor_on_the_worker() -> None:
    setup = Setup(request(samples=10), {})
    worker = Worker(setup)
    worker.run(SIMULATOR, 0, 0)
    after = worker.run(SIMULATOR, 1, 2)
    fresh = Worker(setup).run(SIMULATOR, 1, 2)
    assert np.array_equal(after.frames, fresh.frames)
    assert np.array_equal(after.actions, fresh.actions)
    lower = Worker(setup).run(RANDOM, 1, 2)
    assert np.array_equal(lower.frames[0], fresh.frames[0])
    assert np.array_equal(lower.goal, fresh.goal)


def test_a_learned_model_is_opened_for_the_domains_actions() -> None:
    asked = []

    def opener(uri: str, domain: str, space: Any, device: torch.device, steps: int, at_once: int) -> SimulatorModel:
        asked.append((uri, domain, space.size, steps, at_once))
        return SimulatorModel(open_domain("square", ""))

    worker = Worker(Setup(request(samples=5, sampler_steps=3), {"a": "runs/a"}), opener)
    first = worker.run("a", 0, 0)
    worker.run("a", 0, 1)
    assert asked == [("runs/a", "square", 2, 3, 50)]
    # The same planner with the same model makes the same plans, whatever the model is called.
    assert np.array_equal(first.frames, worker.run(SIMULATOR, 0, 0).frames)


def test_names_are_short_and_differ() -> None:
    assert names_of(["runs/a", "s3://b/runs/c/export"]) == {"a": "runs/a", "c": "s3://b/runs/c/export"}
    assert list(names_of(["x/a", "y/a/export", "random"])) == ["a-1", "a-2", "random-1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"episodes": 0}, "--episodes is 0: give at least 1"),
        ({"horizon": 0}, "--horizon is 0"),
        ({"samples": -1}, "--samples is -1"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": (1, 1)}, "--seeds 1 1: give one or more different numbers"),
        ({"domain": "sqare"}, "did you mean 'square'"),
        ({"task": "corners"}, "did you mean 'corner'"),
        ({"learned": ("nowhere",)}, "nowhere holds no export"),
    ],
)
def test_bad_requests_are_refused_before_anything_starts(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        prepare(request(**changes), with_classifier=False)


@pytest.mark.ray
def test_the_job_compares_the_references(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import ray

    options = ["--episodes", "2", "--seeds", "0", "1", "--samples", "20", "--horizon", "6", "--parallel", "2", "--output", str(tmp_path)]
    try:
        result = job.main(options)
        with pytest.raises(UserError, match="nowhere holds no export"):
            run_on_ray(Setup(request(), {"a": "nowhere"}), 1, 0.0, lambda _: None)
    finally:
        ray.shutdown()
    assert list(result["models"]) == [SIMULATOR, RANDOM]
    assert result["models"][RANDOM]["episodes"] == 4
    assert set(result["models"][SIMULATOR]["rate_by_seed"]) == {"0", "1"}
    assert {path.name for path in tmp_path.rglob("*.mp4")} == {f"{m}-{w}.mp4" for m in (SIMULATOR, RANDOM) for w in ("best", "worst")}
    assert "random" in capsys.readouterr().out
