"""From recipe, YAML file and command line to one configuration.

A YAML file is a set of overrides: it is flattened to the same dotted options that the command line takes, so both are parsed, typed and refused
by the same rules. Later wins: recipe, then file, then command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import tyro
import yaml

from cola_dist.arms import ARMS
from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.recipes import RECIPES, build_recipe
from cola_dist.redact import everywhere, without_credentials

_IDENTITY = (
    "recipe",
    "method",
    "data",
    "lam",
    "conditioning",
    "autoencoder",
    "world",
    "flow",
    "objective",
    "optim",
    "lam_phase",
    "warmup",
    "joint",
    "adapt",
    "train.seed",
)
_FREE = (
    "data.max_bad_share",
    "data.steps_per_read",
    "data.prefetch_reads",
    "data.decoded_cache_bytes",
    "data.disk_cache",
    "data.disk_cache_bytes",
    "data.reader_cpus",
    "data.latents",
    "data.latents_cache",
    "data.latent_workers",
    "optim.micro_batch",
    "autoencoder.images_at_once",
    "joint.steps",
    "adapt.steps",
    "joint.guard",
    "joint.guard_after",
    "joint.guard_returns",
)
_STAGES = "--data.stages"
LARGEST_YAML, MOST_YAML = 2**20, 100_000
"""Bytes of a YAML file, and values in it."""


@dataclass(frozen=True)
class Job:
    """What a user asked a job to do."""

    config: RunConfig
    overrides: tuple[str, ...]
    """File's and command line's options, so that a resumed run can apply them to its own configuration."""
    recipe_given: bool
    resume: str | None
    dry_run: bool
    debug: bool


def parse_job(argv: Sequence[str], default_recipe: str, prog: str, method: str) -> Job:
    """Parse ``[recipe[+arm]] [--config FILE] [--resume RUN] [--dry-run] [--debug] [--section.field VALUE …]``. Raises ``UserError``."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--resume", metavar="RUN")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    own, override = split_options(argv, takes_value={"--config", "--resume"}, flags={"--dry-run", "--debug", "--help", "-h"})
    known = parser.parse_args(own)
    recipe = known.recipe or default_recipe
    if known.help:
        parser.print_help()
        override = ["--help"]
    options = [*(_from_yaml(known.config) if known.config else ()), *override]
    config = apply_overrides(base_of(recipe), options)
    if config.method != method:
        raise UserError(f"recipe {config.recipe!r} with method {config.method} is for jobs/{config.method}.py, not for {prog}")
    return Job(config, tuple(options), known.recipe is not None, known.resume, known.dry_run, known.debug)


def base_of(recipe: str) -> RunConfig:
    """The run that ``recipe`` or ``recipe+arm`` names. Raises ``UserError`` with the nearest known name."""
    first, *arms = recipe.split("+")
    for kind, names, known in (("recipe", [first], RECIPES), ("arm", arms, ARMS)):
        for name in names:
            if name not in known:
                raise UserError(f"unknown {kind} {name!r}{nearest(name, known)}; there are: {', '.join(known)}")
    return build_recipe(recipe)


def apply_overrides(base: RunConfig, options: Sequence[str]) -> RunConfig:
    """``base`` with ``--section.field value`` options applied. Raises ``UserError`` for an unknown name, with the nearest known one."""
    names = [name for name, _ in leaves(base)]
    for option in options:
        if option.startswith("--") and option != "--help":
            name = option[2:].split("=", 1)[0].replace("-", "_")
            if name not in names:
                raise UserError(f"unknown option {option!r}{nearest(name, names)}; --help lists all")
    chosen = _merge_repeated(options)
    if _STAGES in chosen:
        _parse_stages(chosen[_STAGES])  # says what is wrong in one line, where tyro would print a page
    merged = [word for name, values in chosen.items() for word in (name, *values)]
    rules = tyro.constructors.ConstructorRegistry()
    rules.primitive_rule(_mixture_rule)
    config: RunConfig = tyro.cli(
        RunConfig, default=base, args=merged, prog="options", config=(tyro.conf.FlagConversionOff,), registry=rules
    )
    return config


def load_yaml(text: str | bytes) -> Any:
    """What a YAML text says: plain values alone, each key once, and no more of it than ``MOST_YAML``. Raises ``yaml.YAMLError``."""
    if len(text) > LARGEST_YAML:
        raise yaml.YAMLError(f"longer than {LARGEST_YAML} bytes")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        if _nodes(node, {}) > MOST_YAML:
            raise yaml.YAMLError(f"unfolds to more than {MOST_YAML} values")
        return loader.construct_document(node)
    except (RecursionError, ValueError) as error:
        raise yaml.YAMLError("nested too deeply" if isinstance(error, RecursionError) else str(error)) from error
    finally:
        loader.dispose()


def _nodes(node: yaml.Node, known: dict[yaml.Node, int]) -> int:
    """Values in ``node``, each anchor counted wherever it is used: text of a line may stand for billions. Raises ``yaml.YAMLError``."""
    if node not in known:
        known[node] = MOST_YAML + 1  # what leads back to itself has no end
        inner = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            names = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for name, times in names.items():
                if times > 1:
                    raise yaml.YAMLError(f"key {name!r} {times} times in one mapping, which begins at line {node.start_mark.line + 1}")
            inner = [part for pair in node.value for part in pair]
        known[node] = 1 + sum(_nodes(part, known) for part in inner)
    return known[node]


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML. Credentials inside a URI, which `checks.check` refuses, are not in it."""
    return yaml.safe_dump(everywhere(dataclasses.asdict(config), without_credentials), sort_keys=False)


def from_yaml(text: str, where: str) -> RunConfig:
    """A resolved configuration that ``to_yaml`` wrote. Raises ``UserError`` if it is not one of this version."""
    try:
        tree = load_yaml(text)
    except yaml.YAMLError as error:
        raise UserError(f"{where} is damaged ({' '.join(str(error).split())}): restore it, or start a new run") from error
    if not isinstance(tree, dict) or str(tree.get("recipe")).partition("+")[0] not in RECIPES:
        raise UserError(f"{where} is not the configuration of a run of this version of cola-dist: start a new run")
    return apply_overrides(base_of(tree["recipe"]), list(as_options(tree, where)))


def differences(saved: RunConfig, wanted: RunConfig, step: int) -> list[str]:
    """Fields whose change would make a run that is resumed at ``step`` another run: model, loss, order of clips, schedule up to there."""
    old, new = (dict(leaves(config)) for config in (saved, wanted))
    for values in (old, new):
        values["data.stages"] = {begin: mixture for begin, mixture in sorted(values["data.stages"].items()) if begin < step}
    # A cosine's whole course depends on where it ends.
    free = set(_FREE) - ({"joint.steps", "adapt.steps"} if saved.optim.decay == "cosine" else set())
    names = [n for n in old if n not in free and any(n == prefix or n.startswith(prefix + ".") for prefix in _IDENTITY)]
    shown = {"data.stages": f"data.stages before step {step}, where the newest checkpoint stands"}
    return [f"{shown.get(n, n)}: {old[n]!r} in the run, {new[n]!r} asked for" for n in names if _in_order(old[n]) != _in_order(new[n])]


def changes(saved: RunConfig, wanted: RunConfig) -> dict[str, dict[str, Any]]:
    """Every field in which two configurations differ: its dotted name to ``{"from": …, "to": …}``."""
    old, new = dict(leaves(saved)), dict(leaves(wanted))
    return {name: {"from": old[name], "to": new[name]} for name in old if _in_order(old[name]) != _in_order(new[name])}


def _in_order(value: Any) -> Any:
    """A mapping as pairs: the order of the mixture's sources is part of the order of clips, equality of mappings is not."""
    return [(key, _in_order(item)) for key, item in value.items()] if isinstance(value, Mapping) else value


def _mixture_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """``Mapping[str, float]`` as pairs of words that replace the whole default, where tyro would offer the default's keys only.

    A mapping of mappings, which pairs of words cannot say, is YAML in one word.
    """
    if get_origin(info.type) is not Mapping:
        return None
    if get_args(info.type)[0] is int:
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs="*",
            metavar="{STEP: {FOLDER: WEIGHT, …}, …}",
            instance_from_str=_parse_stages,
            is_instance=lambda value: isinstance(value, Mapping),
            str_from_instance=_mapping_words,
        )

    def build(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError("expected pairs: FOLDER WEIGHT [FOLDER WEIGHT …]")
        return {uri: float(weight) for uri, weight in zip(words[::2], words[1::2], strict=True)}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FOLDER WEIGHT …",
        instance_from_str=build,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=_mapping_words,
    )


def _mapping_words(value: Mapping[Any, Any]) -> list[str]:
    """A mapping as words of the command line."""
    if any(isinstance(item, Mapping) for item in value.values()):
        return [yaml.safe_dump(dict(value), default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf).strip()]
    return [str(word) for pair in value.items() for word in pair]


def _parse_stages(words: list[str]) -> dict[int, dict[str, float]]:
    text = " ".join(words)
    try:
        tree = load_yaml(text or "{}")
        stages = {step: {str(folder): float(weight) for folder, weight in mixture.items()} for step, mixture in tree.items()}
    except (yaml.YAMLError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"data.stages {text!r} cannot be read: write it as '{{4000: {{FOLDER: 0.3, FOLDER: 0.7}}}}'") from error
    for step in stages:
        if type(step) is not int:
            raise UserError(f"data.stages: {step!r} is no step: it must be a whole number")
    return stages


def split_options(argv: Sequence[str], takes_value: set[str], flags: set[str]) -> tuple[list[str], list[str]]:
    """A job's own options, with a value or without, and the configuration's: from an unknown ``--option`` on, values go with it."""
    own, override, target = [], [], None
    pending = False
    for word in argv:
        name = word.split("=", 1)[0]
        if name in takes_value or name in flags:
            own.append(word)
            pending, target = name in takes_value and "=" not in word, None
        elif pending:
            own.append(word)
            pending = False
        elif word.startswith("--"):
            override.append(word)
            target = override
        elif target is None:
            own.append(word)
        else:
            override.append(word)
    return own, override


def _merge_repeated(options: Sequence[str]) -> dict[str, list[str]]:
    """The last words of each option: a file may set what the command line sets again."""
    chosen: dict[str, list[str]] = {}
    current: list[str] = []
    for word in options:
        if word.startswith("--"):
            name, given, value = word.partition("=")
            current = [value] if given else []
            key = "--" + name[2:].replace("-", "_")
            chosen.pop(key, None)
            chosen[key] = current
        else:
            current.append(word)
    return chosen


def _from_yaml(path: str) -> Iterator[str]:
    try:
        tree = load_yaml(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path} must be a mapping of sections to fields")
    yield from as_options(tree, path)


def as_options(tree: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[str]:
    """A tree of sections, fields (or dotted names) and values as words of the command line. Raises ``UserError``, which says ``where``."""
    known = [name for name, _ in leaves(RECIPES["tiny"]())]
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in known:
            yield from (f"--{name}", *(_mapping_words(value) if isinstance(value, Mapping) else [str(value)]))
        elif any(k.startswith(f"{name}.") for k in known) and isinstance(value, Mapping):
            yield from as_options(value, where, f"{name}.")
        elif any(k.startswith(f"{name}.") for k in known):
            raise UserError(f"section {name!r} in {where} must be a mapping of fields to values")
        else:
            raise UserError(f"unknown key {name!r} in {where}{nearest(name, known)}")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted name and value of every field of a configuration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(get_type_hints(type(config))[field.name]):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """What a message adds to an unknown name: the known one that looks most like it, if any does."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
