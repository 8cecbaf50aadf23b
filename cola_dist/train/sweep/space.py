"""What a sweep tries: a space of configurations, from a name or a YAML file, with every mistake in it named.

    recipe: tiny                      # the run that all trials start from
    arms: [cola, no-warmup]           # each on its own
    domains:                          # label: what sets it apart; none = the recipe's own data
      robot: {data.mixture: {embedded:robot: 1.0}}
    seeds: 3                          # 0, 1, 2; or a list
    fields:                           # choices, or a range
      warmup_length: [0, 200, adaptive]
      joint.lr_lam: {log_uniform: [1e-4, 1e-2]}
    fixed: {diagnostics.every: 50}    # the same in every trial
    search: grid                      # or random, optuna: then ``samples`` points for each arm and domain
    metric: flow_loss                 # an indicator of the evaluations on held-out clips
    mode: min
    asha: {grace_seconds: 20, reduction: 3}
    collapse: {after_looks: 3, from_seconds: 30}

Two fields are none of a run's own: ``warmup_length`` (steps of warm-up out of the recipe's warm-up and joint steps together, or ``adaptive``)
and ``lr_ratio`` (``joint.lr_lam`` over ``joint.lr_world``; the former stays).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from cola_dist.arms import ARMS
from cola_dist.errors import UserError
from cola_dist.settings import as_options, base_of, leaves, load_yaml, nearest
from cola_dist.train.sweep.spaces import SPACES

Scalar = str | int | float | bool | None
GRID, RANDOM, OPTUNA = "grid", "random", "optuna"
WARMUP_LENGTH, LR_RATIO, ADAPTIVE = "warmup_length", "lr_ratio", "adaptive"
SETS: Mapping[str, tuple[str, ...]] = {
    WARMUP_LENGTH: ("warmup.steps", "warmup.exit", "joint.steps"),
    LR_RATIO: ("joint.lr_world",),
}
"""The fields of a run that a field of the space's own sets."""
PLACE = ("train.workers", "train.gpus", "train.cpus_per_worker", "data.reader_cpus", "data.latents", "data.latent_workers")
"""What decides how much of the cluster a trial takes: the same for all."""
NOT_SWEPT: Mapping[str, str] = {
    "recipe": "is the space's key recipe",
    "method": "is the recipe's",
    "output": "is where the sweep goes: --output",
    "train.seed": "is the space's key seeds",
    "train.budget_seconds": "is the same for all trials: --budget",
    "data.mixture": "is a mapping: give domains, a label and a mixture each",
    "data.stages": "is a mapping: give domains, a label and stages each",
    **dict.fromkeys(PLACE, "decides what a trial takes of the cluster: give it under fixed, for all trials"),
}
_KINDS = ("uniform", "log_uniform", "int_uniform")
_DEFAULT_DOMAIN = "default"


@dataclass(frozen=True)
class Range:
    """Values between ``low`` and ``high``; of ``int_uniform`` whole ones, both ends included."""

    kind: str
    low: float
    high: float

    def at(self, share: float) -> float | int:
        """The value at ``share`` in [0, 1) of the way, equally likely values at equal distances."""
        if self.kind == "int_uniform":
            return int(self.low) + int(share * (int(self.high) - int(self.low) + 1))
        if self.kind == "log_uniform":
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


@dataclass(frozen=True)
class Asha:
    """Asynchronous successive halving (1810.05934) on the metric at equal accelerator time."""

    grace_seconds: float | None = None
    """Accelerator-seconds that every trial gets; none = ``reduction ** -2`` of the budget."""
    reduction: float = 3.0
    """Of the trials that come to a rung about one in so many goes on; rungs are this factor of accelerator time apart."""


@dataclass(frozen=True)
class Collapse:
    """When a trial counts as dead."""

    after_looks: int = 3
    """Evaluations in a row whose verdict is ``collapsed``."""
    from_seconds: float | None = None
    """Accelerator-seconds that every trial gets first, because conditioning starts at zero; none = 40 % of the budget."""


@dataclass(frozen=True)
class Space:
    """A space that holds together; its docstring is the module's."""

    name: str
    recipe: str = "tiny"
    arms: tuple[str, ...] = ("cola",)
    domains: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: {_DEFAULT_DOMAIN: {}})
    seeds: tuple[int, ...] = (0,)
    fields: Mapping[str, tuple[Scalar, ...] | Range] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    search: str = GRID
    samples: int = 0
    metric: str = "flow_loss"
    mode: str = "min"
    asha: Asha | None = None
    collapse: Collapse | None = None


def load_space(name: str) -> Space:
    """The space of that name, or of the YAML file ``name``. Raises ``UserError``."""
    if name in SPACES:
        return read_space(SPACES[name], name, f"space {name}")
    if not name.endswith((".yaml", ".yml")):
        raise UserError(f"unknown space {name!r}{nearest(name, SPACES)}; there are: {', '.join(SPACES)}; or give a YAML file")
    try:
        tree = load_yaml(Path(name).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read space {name}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"space {name} must be a mapping with keys such as arms, fields and seeds")
    return read_space(tree, Path(name).stem, name)


def to_tree(space: Space) -> dict[str, Any]:
    """The mapping from which ``read_space`` makes this space again."""
    plain = {key: value for key, value in asdict(space).items() if key != "name" and value is not None}
    fields = {name: {v.kind: [v.low, v.high]} if isinstance(v, Range) else list(v) for name, v in space.fields.items()}
    tree = plain | {"arms": list(space.arms), "seeds": list(space.seeds), "fields": fields}
    for key in ("asha", "collapse"):
        if key in tree:
            tree[key] = {name: value for name, value in tree[key].items() if value is not None}
    return tree


def read_space(tree: Mapping[str, Any], name: str, where: str) -> Space:
    """The space that a mapping as in a YAML file describes. Raises one ``UserError`` for what is wrong, which says ``where``."""
    keys = [key for key in Space.__dataclass_fields__ if key != "name"]
    for key in tree:
        if key not in keys:
            raise UserError(f"unknown key {key!r} in {where}{nearest(str(key), keys)}; there are: {', '.join(keys)}")
    given: dict[str, Any] = {key: value for key, value in tree.items() if value is not None}
    readers = {"arms": _arms, "domains": _domains, "seeds": read_seeds, "fields": _fields, "asha": _asha, "collapse": _collapse}
    for key, reader in readers.items():
        if key in given:
            given[key] = reader(given[key], f"{where}: {key}")
    for key, kind in (("recipe", str), ("metric", str), ("samples", int)):
        if key in given and type(given[key]) is not kind:
            raise UserError(f"{where}: {key} is {given[key]!r}: it must be {'a name' if kind is str else 'a whole number'}")
    if "fixed" in given:
        list(as_options(_mapping(given["fixed"], f"{where}: fixed"), f"{where}: fixed"))  # names what is unknown
    space = Space(name, **given)
    if base_of(space.recipe).method != "cotrain" or "+" in space.recipe:
        raise UserError(f"{where}: recipe is {space.recipe!r}: it must be one of co-training, without arms, which have a key of their own")
    for key, known in (("search", (GRID, RANDOM, OPTUNA)), ("mode", ("min", "max"))):
        if (value := given.get(key, known[0])) not in known:
            raise UserError(f"{where}: {key} is {value!r}{nearest(str(value), known)}: it must be one of {', '.join(known)}")
    _check_search(space, where)
    return space


def _check_search(space: Space, where: str) -> None:
    ranges = [name for name, values in space.fields.items() if isinstance(values, Range)]
    if space.search == GRID and ranges:
        raise UserError(
            f"{where}: {', '.join(ranges)} is a range, of which a grid has no points: list choices, or set search to random or optuna"
        )
    if space.search == GRID and space.samples:
        raise UserError(
            f"{where}: samples is {space.samples}, but a grid has all its points: leave it out, or set search to random or optuna"
        )
    if space.search != GRID and space.samples < 1:
        raise UserError(f"{where}: search {space.search} needs samples, how many points to try for each arm and domain")
    if space.search != GRID and not space.fields:
        raise UserError(f"{where}: search {space.search} needs fields to choose from")
    points = math.prod(len(values) for values in space.fields.values() if not isinstance(values, Range))
    if space.search == RANDOM and not ranges and space.samples > points:
        raise UserError(f"{where}: samples is {space.samples}, but these fields have {points} points: set search to grid")


def _arms(value: Any, where: str) -> tuple[str, ...]:
    names = tuple(_list(value, where))
    for arm in names:
        if names.count(arm) > 1:
            raise UserError(f"{where}: {arm!r} is there twice")
        if arm not in ARMS:
            raise UserError(f"{where}: unknown arm {arm!r}{nearest(str(arm), ARMS)}; there are: {', '.join(ARMS)}")
    return names


def _domains(value: Any, where: str) -> dict[str, dict[str, Any]]:
    domains = {str(label): dict(_mapping(tree, f"{where}.{label}")) for label, tree in _mapping(value, where).items()}
    if not domains:
        raise UserError(f"{where} is empty: leave it out for the recipe's own data")
    for label, tree in domains.items():
        list(as_options(tree, f"{where}.{label}"))  # names what is unknown
    return domains


def read_seeds(value: Any, where: str) -> tuple[int, ...]:
    """Seeds from their number or as a list. Raises ``UserError``."""
    if type(value) is int and value >= 1:
        return tuple(range(value))
    if isinstance(value, list) and value and all(type(seed) is int and seed >= 0 for seed in value) and len(set(value)) == len(value):
        return tuple(value)
    raise UserError(f"{where} is {value!r}: give how many, or a list of different whole numbers")


def _fields(value: Any, where: str) -> dict[str, tuple[Scalar, ...] | Range]:
    known = [*SETS, *(name for name, _ in leaves(base_of("tiny")))]
    found: dict[str, tuple[Scalar, ...] | Range] = {}
    owner: dict[str, str] = {}
    for name, values in _mapping(value, where).items():
        if name not in known:
            raise UserError(f"{where}: unknown field {name!r}{nearest(str(name), known)}")
        reason = NOT_SWEPT.get(name) or ("is the same for all trials" if name.startswith("tracking.") else None)
        if reason:
            raise UserError(f"{where}: {name} {reason}")
        for one in SETS.get(name, (name,)):
            if one in owner:
                raise UserError(f"{where}: both {owner[one]} and {name} set {one}: leave one out")
            owner[one] = name
        found[name] = _range(values, f"{where}.{name}") if isinstance(values, Mapping) else _choices(values, f"{where}.{name}")
    return found


def _choices(value: Any, where: str) -> tuple[Scalar, ...]:
    choices = [_number(choice) for choice in _list(value, where)]
    for number, choice in enumerate(choices):
        if not isinstance(choice, str | int | float | bool | None):
            raise UserError(f"{where}: {choice!r} is no single value")
        # 1 and True are equal, and different choices.
        if any(choice == other and type(choice) is type(other) for other in choices[:number]):
            raise UserError(f"{where}: {choice!r} is there twice")
    return tuple(choices)


def _range(value: Mapping[str, Any], where: str) -> Range:
    (kind, ends), *more = value.items() if value else [("", None)]
    if kind not in _KINDS or more:
        raise UserError(f"{where} is {dict(value)!r}: give a list of choices, or one of {', '.join(_KINDS)} with [lowest, highest]")
    numbers = [_number(end) for end in ends] if isinstance(ends, list | tuple) else []
    finite = len(numbers) == 2 and all(type(end) in (int, float) and math.isfinite(end) for end in numbers)
    if not finite or not numbers[0] < numbers[1] or (kind == "log_uniform" and numbers[0] <= 0):
        above = " above 0" if kind == "log_uniform" else ""
        raise UserError(f"{where}: {kind} is {ends!r}: it must be [lowest, highest], two numbers{above} in this order")
    if kind == "int_uniform" and any(type(end) is not int for end in numbers):
        raise UserError(f"{where}: {kind} is {ends!r}: both ends must be whole numbers")
    return Range(kind, numbers[0], numbers[1])


def _asha(value: Any, where: str) -> Asha:
    rule = Asha(**_numbers(value, where, ("grace_seconds", "reduction")))
    if rule.reduction <= 1 or (rule.grace_seconds is not None and rule.grace_seconds <= 0):
        raise UserError(f"{where}: grace_seconds must be positive and reduction above 1")
    return rule


def _collapse(value: Any, where: str) -> Collapse:
    rule = Collapse(**_numbers(value, where, ("after_looks", "from_seconds")))
    if type(rule.after_looks) is not int or rule.after_looks < 1 or (rule.from_seconds is not None and rule.from_seconds < 0):
        raise UserError(f"{where}: after_looks must be a whole number of at least 1, from_seconds not negative")
    return rule


def _numbers(value: Any, where: str, keys: Sequence[str]) -> dict[str, Any]:
    tree = {key: _number(number) for key, number in _mapping(value, where).items()}
    for key, number in tree.items():
        if key not in keys:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), keys)}")
        if type(number) not in (int, float) or not math.isfinite(number):
            raise UserError(f"{where}: {key} is {number!r}: it must be a number")
    return tree


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{where} is {value!r}: it must be a mapping")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{where} is {value!r}: it must be a list with something in it")
    return list(value)


def _number(value: Any) -> Any:
    """YAML takes 1e-4, without a point, for a text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?[0-9]+[eE][-+]?[0-9]+", value) else value
