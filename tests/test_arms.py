"""Arms: each a small change of a recipe that keeps its length and passes the checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cola_dist.arms import ARMS
from cola_dist.checks import check
from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.methods import phases
from cola_dist.recipes import RECIPES, build_recipe
from cola_dist.settings import base_of, from_yaml, to_yaml

COTRAIN = [name for name, recipe in RECIPES.items() if recipe().method == "cotrain"]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) and key != "mixture" else {f"{prefix}{key}": value}
    return flat


def changed(arm: str) -> set[str]:
    base, other = (leaves(dataclasses.asdict(config)) for config in (build_recipe("tiny"), build_recipe(f"tiny+{arm}")))
    return {name for name in base if base[name] != other[name]} - {"recipe"}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("recipe", COTRAIN)
def test_every_arm_of_every_recipe_is_a_run_of_the_same_length(recipe: str, arm: str) -> None:
    base, config = build_recipe(recipe), build_recipe(f"{recipe}+{arm}")
    check(config)
    assert config.recipe == f"{recipe}+{arm}"
    if arm != "adaptive":
        assert sum(phase.steps for phase in phases(config)) == sum(phase.steps for phase in phases(base))


def test_arms_differ_from_the_recipe_in_what_they_are_named_after() -> None:
    assert changed("cola") == set()
    assert changed("no-warmup") == {"warmup.steps", "joint.steps"}
    assert changed("scratch") == {"warmup.steps", "joint.steps", "world.pretrained"}
    assert changed("warmup-only") == {"warmup.steps", "joint.steps"}
    assert changed("freeze-lam-after-warmup") == {"joint.lr_lam"}
    assert changed("stop-grad") == {"objective.generator_teaches_lam", "objective.forward_weight"}
    assert changed("two-stage") == {"objective.forward_weight", "lam_phase.steps", "lam_phase.lr_lam", "warmup.steps", "joint.lr_lam"}
    assert changed("rotation-trick") == {"lam.bottleneck.kind", "lam.bottleneck.reset_every"}
    for arm in ("entropy-bonus", "ranking", "motion"):
        assert len(changed(arm)) == 1


def test_arms_combine_from_left_to_right() -> None:
    config = build_recipe("tiny+fsq+no-warmup")
    assert (config.lam.bottleneck.kind, config.warmup.steps) == ("fsq", 0)


@pytest.mark.parametrize(("name", "hint"), [("tiny+no-warmpu", "did you mean 'no-warmup'?"), ("tinny+cola", "did you mean 'tiny'?")])
def test_a_misspelt_arm_is_refused_with_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(UserError, match="unknown") as refusal:
        base_of(name)
    assert hint in str(refusal.value)


def test_the_configuration_of_an_arm_comes_back_from_its_file() -> None:
    config: RunConfig = base_of("tiny+two-stage+continuous")
    assert from_yaml(to_yaml(config), "here") == config
