"""From recipe, YAML file and command line to one checked configuration.

A YAML file is a set of overrides: it is flattened to the same dotted options that the command line takes, so both are parsed, typed and refused
by the same rules. Later wins: recipe, then file, then command line.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_origin, get_type_hints

import tyro
import yaml

from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.recipes import RECIPES

_IDENTITY = ("recipe", "method", "data", "lam", "conditioning", "world", "flow", "optim", "warmup", "joint", "train.seed")
_FREE = (
    "data.max_bad_share",
    "data.steps_per_read",
    "data.prefetch_reads",
    "data.decoded_cache_bytes",
    "data.reader_cpus",
    "optim.micro_batch",
    "joint.steps",
)


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
    """Parse ``[recipe] [--config FILE] [--resume RUN] [--dry-run] [--debug] [--section.field VALUE …]``. Raises ``UserError``."""
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    parser.add_argument("recipe", nargs="?")
    parser.add_argument("--config")
    parser.add_argument("--resume", metavar="RUN")
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("-h", "--help", action="store_true")
    own, override = _split(argv)
    known = parser.parse_args(own)
    recipe = known.recipe or default_recipe
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}{_nearest(recipe, RECIPES)}; there are: {', '.join(RECIPES)}")
    if known.help:
        parser.print_help()
        override = ["--help"]
    options = [*(_from_yaml(known.config) if known.config else ()), *override]
    config = apply_overrides(RECIPES[recipe](), options)
    if config.method != method:
        raise UserError(f"recipe {config.recipe!r} with method {config.method} is for jobs/{config.method}.py, not for {prog}")
    return Job(config, tuple(options), known.recipe is not None, known.resume, known.dry_run, known.debug)


def apply_overrides(base: RunConfig, options: Sequence[str]) -> RunConfig:
    """``base`` with ``--section.field value`` options applied. Raises ``UserError`` for an unknown name, with the nearest known one."""
    names = [name for name, _ in _leaves(base)]
    for option in options:
        if option.startswith("--") and option != "--help":
            name = option[2:].split("=", 1)[0].replace("-", "_")
            if name not in names:
                raise UserError(f"unknown option {option!r}{_nearest(name, names)}; --help lists all")
    merged = _merge_repeated(options)
    rules = tyro.constructors.ConstructorRegistry()
    rules.primitive_rule(_mixture_rule)
    config: RunConfig = tyro.cli(
        RunConfig, default=base, args=merged, prog="options", config=(tyro.conf.FlagConversionOff,), registry=rules
    )
    return config


def check(config: RunConfig) -> None:
    """Cross-field checks that need no data and no accelerator. Raises one ``UserError`` that lists every problem, a line each."""
    problems = list(_problems(config))
    if problems:
        raise UserError(f"{len(problems)} problem(s) in the configuration:\n" + "\n".join(f"  - {p}" for p in problems))


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def from_yaml(text: str, where: str) -> RunConfig:
    """A resolved configuration that ``to_yaml`` wrote. Raises ``UserError`` if it is not one of this version."""
    tree = yaml.safe_load(text)
    if not isinstance(tree, dict) or tree.get("recipe") not in RECIPES:
        raise UserError(f"{where} is not the configuration of a run of this version of cola-dist: start a new run")
    return apply_overrides(RECIPES[tree["recipe"]](), list(_flatten(tree, where)))


def differences(saved: RunConfig, wanted: RunConfig) -> list[str]:
    """Fields whose change would make a resumed run another run: model, loss, order of clips, schedule up to here."""
    old, new = dict(_leaves(saved)), dict(_leaves(wanted))
    # A cosine's whole course depends on where it ends.
    free = set(_FREE) - ({"joint.steps"} if saved.optim.decay == "cosine" else set())
    names = [n for n in old if n not in free and any(n == prefix or n.startswith(prefix + ".") for prefix in _IDENTITY)]
    return [f"{n}: {old[n]!r} in the run, {new[n]!r} asked for" for n in names if _in_order(old[n]) != _in_order(new[n])]


def _in_order(value: Any) -> Any:
    """A mapping as pairs: the order of the mixture's sources is part of the order of clips, equality of mappings is not."""
    return list(value.items()) if isinstance(value, Mapping) else value


def _mixture_rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """``Mapping[str, float]`` as pairs of words that replace the whole default, where tyro would offer the default's keys only."""
    if get_origin(info.type) is not Mapping:
        return None

    def build(words: list[str]) -> dict[str, float]:
        if len(words) % 2:
            raise ValueError("expected pairs: FOLDER WEIGHT [FOLDER WEIGHT …]")
        return {uri: float(weight) for uri, weight in zip(words[::2], words[1::2], strict=True)}

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="FOLDER WEIGHT …",
        instance_from_str=build,
        is_instance=lambda value: isinstance(value, Mapping),
        str_from_instance=lambda mixture: [str(word) for pair in mixture.items() for word in pair],
    )


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The job's own options, and the configuration's: from the first unknown ``--option`` on, values go with it."""
    own, override, target = [], [], None
    takes_value = {"--config", "--resume"}
    flags = {"--dry-run", "--debug", "--help", "-h"}
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


def _merge_repeated(options: Sequence[str]) -> list[str]:
    """Keep the last of each option: a file may set what the command line sets again."""
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
    return [word for name, values in chosen.items() for word in (name, *values)]


def _from_yaml(path: str) -> Iterator[str]:
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"cannot read configuration {path}: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"configuration {path} must be a mapping of sections to fields")
    yield from _flatten(tree, path)


def _flatten(tree: Mapping[str, Any], where: str, prefix: str = "") -> Iterator[str]:
    known = [name for name, _ in _leaves(RECIPES["tiny"]())]
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in known:
            words = [str(w) for pair in value.items() for w in pair] if isinstance(value, Mapping) else [str(value)]
            yield from (f"--{name}", *words)
        elif any(k.startswith(f"{name}.") for k in known) and isinstance(value, Mapping):
            yield from _flatten(value, where, f"{name}.")
        elif any(k.startswith(f"{name}.") for k in known):
            raise UserError(f"section {name!r} in {where} must be a mapping of fields to values")
        else:
            raise UserError(f"unknown key {name!r} in {where}{_nearest(name, known)}")


def _leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(get_type_hints(type(config))[field.name]):
            yield from _leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _problems(c: RunConfig) -> Iterator[str]:
    yield from _data_problems(c)
    yield from _model_problems(c)
    yield from _training_problems(c)
    yield from _observation_problems(c)


def _data_problems(c: RunConfig) -> Iterator[str]:
    if not c.data.mixture:
        yield "data.mixture is empty: name at least one shard folder and its weight"
    for uri, weight in c.data.mixture.items():
        if not 0 < weight < float("inf"):
            yield f"data.mixture weight of {uri} is {weight}: it must be positive"
    if c.data.frames < 2:
        yield f"data.frames is {c.data.frames}: a transition needs at least 2 frames"
    for name, value in (("rate_hz", c.data.rate_hz), ("reader_cpus", c.data.reader_cpus)):
        if not value > 0:
            yield f"data.{name} is {value}: it must be positive"
    for name, value in (
        ("resolution", c.data.resolution),
        ("mixture_block", c.data.mixture_block),
        ("steps_per_read", c.data.steps_per_read),
        ("prefetch_reads", c.data.prefetch_reads),
    ):
        if value < 1:
            yield f"data.{name} is {value}: it must be at least 1"
    if c.data.decoded_cache_bytes < 0:
        yield f"data.decoded_cache_bytes is {c.data.decoded_cache_bytes}: it must not be negative"
    if not 0 < c.data.crop_scale <= 1:
        yield f"data.crop_scale is {c.data.crop_scale}: it must be in (0, 1]"
    if not 0 <= c.data.max_bad_share <= 1:
        yield f"data.max_bad_share is {c.data.max_bad_share}: it must be in [0, 1]"


def _model_problems(c: RunConfig) -> Iterator[str]:
    for section, part in (("lam", c.lam), ("conditioning", c.conditioning), ("world", c.world)):
        if part.width < 1 or part.heads < 1 or part.depth < 1:
            yield f"{section}: width, heads and depth must be at least 1"
        elif part.width % part.heads:
            yield f"{section}.width {part.width} is not divisible by {section}.heads {part.heads}"
    for section, patch in (("lam", c.lam.patch), ("world", c.world.patch)):
        if patch < 1 or c.data.resolution % patch:
            yield f"data.resolution {c.data.resolution} is not divisible by {section}.patch {patch}"
    if c.lam.tokens < 1 or c.lam.bottleneck.codes < 2 or c.lam.bottleneck.dim < 1:
        yield "lam: needs at least 1 token, 2 codes and 1 dimension"
    if c.lam.bottleneck.codebook_weight <= 0 or c.lam.bottleneck.commitment_weight < 0 or c.lam.bottleneck.reset_every < 0:
        yield "lam.bottleneck: codebook_weight must be positive, commitment_weight and reset_every not negative"
    if not 0 <= c.conditioning.dropout < 1:
        yield f"conditioning.dropout is {c.conditioning.dropout}: it must be in [0, 1)"
    if not 0 <= c.flow.tau_min < 1 or c.flow.tau_shift <= 0:
        yield f"flow.tau_min {c.flow.tau_min} must be in [0, 1) and flow.tau_shift {c.flow.tau_shift} positive"
    if not 0 <= c.flow.context_max < c.data.frames:
        yield f"flow.context_max is {c.flow.context_max}: at least one of the {c.data.frames} frames must be generated"
    if c.flow.sampler_steps < 1 or c.flow.guidance < 0:
        yield "flow: sampler_steps must be at least 1, guidance not negative"


def _training_problems(c: RunConfig) -> Iterator[str]:
    if "@" in c.tracking.uri.partition("://")[2].partition("/")[0]:
        yield "tracking.uri holds a user or password: put them into MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD instead"
    if c.warmup.steps < 0 or c.joint.steps < 0 or c.warmup.steps + c.joint.steps == 0:
        yield "warmup.steps and joint.steps: neither may be negative, and at least one phase must have steps"
    if c.warmup.lr_world:
        yield f"warmup.lr_world is {c.warmup.lr_world}: the generator is frozen in warm-up, set it to 0"
    if c.method == "pretrain" and (c.warmup.steps or not c.joint.lr_world > 0):
        yield "pretraining has one phase on the generator: set warmup.steps to 0 and joint.lr_world above 0"
    if c.method == "cotrain" and not (c.warmup.lr_lam > 0 and c.joint.lr_lam > 0):
        yield "warmup.lr_lam and joint.lr_lam must be positive"
    if c.method == "cotrain" and c.joint.steps and not c.joint.lr_world > 0:
        yield "joint.lr_world must be positive (to leave the generator frozen, set joint.steps to 0)"
    if c.train.workers < 1:
        yield f"train.workers is {c.train.workers}: it must be at least 1"
    elif c.optim.global_batch < 1 or c.optim.global_batch % c.train.workers:
        yield f"optim.global_batch {c.optim.global_batch} is not divisible by train.workers {c.train.workers}"
    elif c.optim.micro_batch < 0 or (c.optim.micro_batch and c.optim.global_batch // c.train.workers % c.optim.micro_batch):
        yield f"optim.micro_batch {c.optim.micro_batch} does not divide a worker's share of {c.optim.global_batch // c.train.workers} clips"
    if not (0 <= c.optim.beta1 < 1 and 0 <= c.optim.beta2 < 1 and 0 <= c.optim.ema_decay < 1):
        yield "optim: beta1, beta2 and ema_decay must be in [0, 1)"
    if c.optim.weight_decay < 0 or c.optim.clip_norm <= 0 or c.optim.lr_warmup_steps < 0:
        yield "optim: weight_decay and lr_warmup_steps must not be negative, clip_norm must be positive"
    if c.train.cpus_per_worker <= 0 or c.train.max_restarts < 0:
        yield "train: cpus_per_worker must be positive, max_restarts not negative"
    for name in ("checkpoint_every", "keep_checkpoints", "max_nonfinite"):
        if dict(_leaves(c.train))[name] < 1:
            yield f"train.{name} must be at least 1"


def _observation_problems(c: RunConfig) -> Iterator[str]:
    d = c.diagnostics
    if d.every < 1 or d.video_every < 1 or c.tracking.log_every < 1:
        yield "diagnostics.every, diagnostics.video_every and tracking.log_every must be at least 1"
    if d.batch < 2 or d.clips < d.batch or d.clips % d.batch:
        yield f"diagnostics.clips {d.clips} must be a multiple of diagnostics.batch {d.batch}, which must be at least 2 to shuffle actions"
    if not 0 <= d.video_clips <= d.batch or d.video_clips == 1:
        yield f"diagnostics.video_clips is {d.video_clips}: it must be 0, or between 2 (to exchange actions) and diagnostics.batch {d.batch}"
    if d.probe_clips < 0:
        yield f"diagnostics.probe_clips is {d.probe_clips}: it must not be negative"
    if not (0 <= d.min_perplexity_share <= 1 and 0 < d.max_usage <= 1 and d.min_gap >= 0 and d.min_rank >= 0):
        yield "diagnostics: min_perplexity_share and max_usage must be shares in [0, 1], min_gap and min_rank not negative"
    if not c.tracking.uri and "://" in c.output and not c.output.startswith("file://"):
        yield f"tracking.uri is empty but output {c.output} is object storage, which holds no database: give --tracking.uri"
