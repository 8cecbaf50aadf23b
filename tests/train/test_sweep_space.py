"""Spaces of a sweep: what they expand to, and what is refused before anything starts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cola_dist.arms import ARMS
from cola_dist.command import run_command
from cola_dist.errors import UserError
from cola_dist.recipes import build_recipe
from cola_dist.train.sweep.plan import STRETCH, Plan, draw_points
from cola_dist.train.sweep.space import Range, Space, load_space, read_space, to_tree
from cola_dist.train.sweep.spaces import SPACES
from jobs import sweep as job

FIELDS = {
    "warmup_length": [0, 100, "adaptive"],
    "lr_ratio": [1, 2],
    "joint.lr_lam": [1e-4, 1e-3, 1e-2],
    "lam.bottleneck.entropy_weight": [0.0, 0.1],
    "optim.clip_norm": [0.5, 1.0, 2.0, 4.0],
}
RANGES: Mapping[str, Mapping[str, list[float]]] = {
    "joint.lr_conditioning": {"log_uniform": [1e-4, 1e-2]},
    "objective.motion_weight": {"uniform": [0.0, 2.0]},
    "lam.bottleneck.codes": {"int_uniform": [8, 64]},
}


def plan(tree: Mapping[str, Any], *overrides: str, budget: float = 0.0) -> Plan:
    return Plan(read_space(tree, "mine", "mine.yaml"), "mine-abc123", "/tmp/trials", "sqlite:////tmp/mlflow.db", overrides, budget)


def refusal(tree: Mapping[str, Any], *overrides: str, budget: float = 0.0) -> str:
    with pytest.raises(UserError) as refused:
        plan(tree, *overrides, budget=budget).check()
    return str(refused.value)


grids = st.fixed_dictionaries(
    {
        "arms": st.lists(st.sampled_from(["cola", "vq", "ranking", "motion"]), min_size=1, unique=True),
        "domains": st.sampled_from([{"default": {}}, {"robot": {"data.mixture": {"embedded:robot": 1.0}}, "both": {}}]),
        "seeds": st.one_of(st.integers(1, 4), st.lists(st.integers(0, 9), min_size=1, unique=True)),
        "fields": st.dictionaries(st.sampled_from(list(FIELDS)), st.nothing(), max_size=0)
        | st.lists(st.sampled_from(list(FIELDS)), unique=True).map(lambda names: {name: FIELDS[name] for name in names}),
    }
)


@given(grids)
def test_a_grid_holds_every_combination_once(tree: dict[str, Any]) -> None:
    made = plan(tree)
    trials = made.trials()
    seeds = tree["seeds"] if isinstance(tree["seeds"], list) else range(tree["seeds"])
    expected = set(itertools.product(tree["arms"], tree["domains"], seeds, *tree["fields"].values()))
    assert [trial.number for trial in trials] == list(range(len(expected))) == list(range(made.total))
    assert {(trial.arm, trial.domain, trial.seed, *trial.params.values()) for trial in trials} == expected
    assert len({trial.id for trial in trials}) == len(trials)
    assert plan(tree).trials() == trials


@given(st.integers(1, 20), st.integers(1, 20))
def test_random_points_are_different_within_range_and_the_same_every_time(few: int, more: int) -> None:
    tree = {"search": "random", "fields": {**RANGES, "lr_ratio": [1, 2]}}
    first, longer = (draw_points(read_space(tree | {"samples": n}, "mine", "mine.yaml")) for n in (few, few + more))
    assert longer[:few] == first, "more samples go on from the same points"
    assert len({tuple(point.values()) for point in longer}) == few + more
    for name, ends in RANGES.items():
        ((kind, (low, high)),) = ends.items()
        values = [point[name] for point in longer]
        assert all(isinstance(value, int if kind == "int_uniform" else float) and low <= value <= high for value in values)


@given(st.floats(0, 1, exclude_max=True))
def test_a_range_is_drawn_evenly(share: float) -> None:
    assert Range("uniform", -1, 3).at(share) == pytest.approx(-1 + 4 * share)
    assert math.log10(Range("log_uniform", 1e-4, 1.0).at(share)) == pytest.approx(-4 + 4 * share, abs=1e-9)
    assert Range("int_uniform", 3, 6).at(share) == 3 + int(4 * share)


@pytest.mark.parametrize("name", SPACES)
def test_named_spaces_hold_together_and_are_read_again_as_they_were_written(name: str) -> None:
    space = load_space(name)
    assert read_space(yaml.safe_load(yaml.safe_dump(to_tree(space))), name, "copy.yaml") == space
    made = Plan(space, f"{name}-abc123", "/tmp/trials", "sqlite:////tmp/mlflow.db", (), 600.0)
    assert len(made.check()) == made.total


def test_a_trial_is_its_arm_at_its_point() -> None:
    made = plan({"arms": ["cola", "no-warmup", "freeze-lam-after-warmup"], "fields": {"lr_ratio": [4]}, "seeds": [7]}, "--data.frames", "6")
    for trial in made.trials():
        config, recipe = made.config(trial), build_recipe(f"tiny+{trial.arm}")
        assert (config.recipe, config.train.seed, config.data.frames) == (recipe.recipe, 7, 6)
        assert (config.warmup.steps, config.joint.steps, config.joint.lr_lam) == (
            recipe.warmup.steps,
            recipe.joint.steps,
            recipe.joint.lr_lam,
        )
        assert config.joint.lr_world == 2e-3 / 4
        assert (config.output, config.tracking.uri) == ("/tmp/trials", "sqlite:////tmp/mlflow.db")


def test_warmup_length_is_taken_from_both_phases_together() -> None:
    made = plan({"fields": {"warmup_length": [0, 300, 1100, "adaptive"]}}, "--warmup.steps", "500", "--joint.steps", "600")
    lengths = [(c.warmup.exit, c.warmup.steps, c.joint.steps) for c in map(made.config, made.trials())]
    assert lengths == [("steps", 0, 1100), ("steps", 300, 800), ("steps", 1100, 0), ("adaptive", 1000, 600)]


def test_a_domain_sets_more_than_data() -> None:
    domain = {"data.mixture": {"embedded:hand": 1.0}, "world": {"pretrained": None}}
    made = plan({"domains": {"hand": domain, "usual": {}}})
    hand, usual = map(made.config, made.trials())
    assert (hand.data.mixture, hand.world.pretrained) == ({"embedded:hand": 1.0}, None)
    assert asdict(usual.data) == asdict(build_recipe("tiny").data)
    assert [trial.id for trial in made.trials()] == ["000-cola-hand-s0-abc123", "001-cola-usual-s0-abc123"]


def test_with_a_budget_the_budget_ends_a_run_and_not_its_steps() -> None:
    for arm in ARMS:
        made, recipe = plan({"arms": [arm]}, budget=60.0), build_recipe(f"tiny+{arm}")
        (config,) = map(made.config, made.trials())
        last, last_of_recipe = (c.joint.steps or c.warmup.steps for c in (config, recipe))
        assert (config.train.budget_seconds, last) == (60.0, STRETCH * last_of_recipe)


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        ({"feilds": {}}, ("unknown key 'feilds' in mine.yaml", "did you mean 'fields'?")),
        ({"fields": {"joint.lr_lm": [1]}}, ("unknown field 'joint.lr_lm'", "did you mean 'joint.lr_lam'?")),
        ({"fields": {"warmup_lenght": [1]}}, ("did you mean 'warmup_length'?",)),
        ({"fields": {"train.seed": [1]}}, ("train.seed is the space's key seeds",)),
        ({"fields": {"train.workers": [1, 2]}}, ("decides what a trial takes of the cluster", "under fixed")),
        ({"fields": {"data.mixture": [1]}}, ("give domains",)),
        ({"fields": {"lr_ratio": [1], "joint.lr_world": [1e-3]}}, ("both lr_ratio and joint.lr_world set joint.lr_world",)),
        ({"fields": {"joint.lr_lam": []}}, ("joint.lr_lam is []: it must be a list with something in it",)),
        ({"fields": {"joint.lr_lam": [1e-3, 1e-3]}}, ("0.001 is there twice",)),
        ({"fields": {"joint.lr_lam": {"log_uniform": [0, 1]}}, "search": "random", "samples": 2}, ("two numbers above 0 in this order",)),
        ({"fields": {"joint.lr_lam": {"normal": [0, 1]}}}, ("one of uniform, log_uniform, int_uniform with [lowest, highest]",)),
        ({"fields": {"joint.lr_lam": {"uniform": [1, 2]}}}, ("joint.lr_lam is a range, of which a grid has no points",)),
        ({"fields": {"joint.lr_lam": [1, 2]}, "search": "random", "samples": 3}, ("samples is 3, but these fields have 2 points",)),
        ({"fields": {"joint.lr_lam": [1, 2]}, "search": "optuna"}, ("search optuna needs samples",)),
        ({"search": "opuna", "samples": 3}, ("search is 'opuna' (did you mean 'optuna'?)",)),
        ({"arms": ["cola", "freeze-lam"]}, ("unknown arm 'freeze-lam'", "there are: cola, no-warmup")),
        ({"recipe": "tinny"}, ("unknown recipe 'tinny' (did you mean 'tiny'?)",)),
        ({"recipe": "tiny+vq"}, ("without arms",)),
        ({"seeds": 0}, ("seeds is 0: give how many, or a list",)),
        (
            {"domains": {"robot": {"data.mixtur": {}}}},
            ("unknown key 'data.mixtur' in mine.yaml: domains.robot", "did you mean 'data.mixture'?"),
        ),
        ({"fixed": {"warmup.step": 3}}, ("unknown key 'warmup.step'", "did you mean 'warmup.steps'?")),
        ({"asha": {"grace": 3}}, ("asha: unknown key 'grace'", "did you mean 'grace_seconds'?")),
        ({"collapse": {"after_looks": 0}}, ("after_looks must be a whole number of at least 1",)),
    ],
)
def test_mistakes_in_a_space_are_named(tree: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as refused:
        read_space(tree, "mine", "mine.yaml")
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)


def test_yaml_writes_small_numbers_as_texts() -> None:
    tree = yaml.safe_load(
        "{search: random, samples: 2, fields: {joint.lr_lam: {log_uniform: [1e-4, 1e-2]}, joint.lr_world: [1e-3, 2e-3, none]}}"
    )
    assert read_space(tree, "mine", "mine.yaml").fields == {
        "joint.lr_lam": Range("log_uniform", 1e-4, 1e-2),
        "joint.lr_world": (1e-3, 2e-3, "none"),
    }


@pytest.mark.parametrize(
    ("tree", "parts"),
    [
        (
            {"arms": ["cola", "freeze-lam-after-warmup"], "fixed": {"warmup.steps": 0}, "seeds": 3},
            (
                "1 problem(s)",
                "- arm freeze-lam-after-warmup, domain default, no fields: joint.lr_lam is 0 and no phase before trains the LAM",
            ),
        ),
        ({"arms": ["adaptive"], "fixed": {"diagnostics.every": 500}}, ("arm adaptive", "too few for 3 evaluations 500 steps apart")),
        ({"arms": ["no-warmup"], "fields": {"warmup.steps": [100]}}, ("warmup.steps 100: arm no-warmup sets warmup.steps itself",)),
        ({"arms": ["vq-faithful"], "fields": {"lam.bottleneck.commitment_weight": [0.5]}}, ("arm vq-faithful sets lam.bottleneck",)),
        ({"arms": ["two-stage"], "fields": {"warmup_length": [100]}}, ("leave warmup_length out, or the arm",)),
        (
            {"fields": {"warmup_length": [2000, "short"]}},
            ("2 problem(s)", "warmup_length is 2000", "out of the 1100", "warmup_length is 'short'"),
        ),
        ({"fields": {"lr_ratio": [0]}}, ("lr_ratio is 0: it must be a positive number",)),
        ({"fields": {"warmup.steps": ["many"]}}, ("fields: Error parsing --warmup.steps",)),
        ({"fields": {"optim.global_batch": [3]}}, ("optim.global_batch 3 is not divisible by train.workers 2",)),
        ({"asha": {}}, ("asha needs grace_seconds, or a budget",)),
        ({"collapse": {}}, ("collapse needs from_seconds, or a budget",)),
        ({"fixed": {"train.seed": 3}}, ("train.seed is the space's key seeds",)),
        ({"fixed": {"joint.lr_lam": 1.0}, "fields": {"joint.lr_lam": [1e-3]}}, ("joint.lr_lam is what this space tries values of",)),
    ],
)
def test_trials_that_cannot_run_are_listed_before_anything_starts(tree: Mapping[str, Any], parts: tuple[str, ...]) -> None:
    message = refusal(tree)
    for part in parts:
        assert part in message


def test_what_a_budget_forbids() -> None:
    assert "optim.decay cosine needs to know a run's last step" in refusal({}, "--optim.decay", "cosine", budget=9.0)
    assert "above the budget of 9 s it decides nothing" in refusal({"collapse": {"from_seconds": 10}}, budget=9.0)
    assert "train.budget_seconds is the same for all trials: --budget" in refusal({}, "--train.budget-seconds", "9")


def job_refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """The line that the job refuses ``args`` with."""
    capsys.readouterr()
    assert run_command(job.main, args) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    return said.err


def test_the_job_refuses_what_cannot_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give a space: warmup, arms" in job_refusal(capsys)
    assert "unknown space 'warmpu' (did you mean 'warmup'?)" in job_refusal(capsys, "warmpu")
    assert "cannot read space none.yaml" in job_refusal(capsys, "none.yaml")
    assert "--concurrent is 0" in job_refusal(capsys, "warmup", "--concurrent", "0")
    assert "--budget is -1" in job_refusal(capsys, "warmup", "--budget", "-1")
    assert "--seeds is 0: give how many" in job_refusal(capsys, "warmup", "--seeds", "0")
    assert "unknown option '--joint.step'" in job_refusal(capsys, "warmup", "--joint.step", "3")
    assert "leave out SPACE, --budget, --joint.steps" in job_refusal(
        capsys, "warmup", "--resume", "x", "--budget", "3", "--joint.steps", "3"
    )
    assert f"no sweep to resume in {tmp_path}/x" in job_refusal(capsys, "--resume", "x", "--output", str(tmp_path))
    assert "a budget of 0.5 s is too small for one evaluation: 200 steps" in job_refusal(capsys, "warmup", "--budget", "0.5")
    missing = tmp_path / "mine.yaml"
    missing.write_text(yaml.safe_dump({"domains": {"here": {}, "there": {"data.mixture": {str(tmp_path / "none"): 1.0}}}}))
    assert f"{tmp_path}/none/index.parquet: not found" in job_refusal(capsys, str(missing))
    assert list(tmp_path.iterdir()) == [missing]


def test_a_space_without_keys_is_the_recipe_itself() -> None:
    assert read_space({}, "mine", "mine.yaml") == Space("mine")
    assert [trial.id for trial in plan({}).trials()] == ["000-cola-s0-abc123"]
