"""A sweep's folder: ``sweep.json`` (what it is about), ``space.yaml``, ``trials.json`` and the trials' runs below ``trials/``."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import yaml

from cola_dist import storage
from cola_dist.errors import UserError
from cola_dist.redact import redact
from cola_dist.settings import apply_overrides, as_options, base_of, load_yaml
from cola_dist.train.session import commit, tracking_uri
from cola_dist.train.sweep.plan import Plan
from cola_dist.train.sweep.space import Space, read_space, to_tree


@dataclass
class Sweep:
    """A sweep and where it is written down."""

    uri: str
    plan: Plan
    about: dict[str, Any]
    """What ``sweep.json`` holds."""

    def path(self, *parts: str) -> str:
        """The URI of a file in the sweep's folder."""
        return storage.join(self.uri, *parts)

    def write(self) -> None:
        """Write ``space.yaml`` and ``sweep.json``."""
        storage.write_bytes(self.path("space.yaml"), yaml.safe_dump(to_tree(self.plan.space), sort_keys=False).encode())
        storage.write_bytes(self.path("sweep.json"), json.dumps(self.about, indent=1).encode())

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Nobody else may run the sweep meanwhile. Raises ``UserError`` if somebody does; of a folder in object storage that is not known."""
        path = storage.local_path(self.path("lock"))
        if path is None:
            yield
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(f"sweep {self.uri} is running in another process: let it end, or end it, and resume then") from error
            yield


def new_sweep(space: Space, overrides: Sequence[str], budget_seconds: float) -> Sweep:
    """A sweep with a fresh folder, of which nothing is on disk yet. ``overrides`` go into the base of every trial. Raises ``UserError``."""
    name = f"{space.name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
    base = apply_overrides(base_of(space.recipe), [*as_options(space.fixed, "fixed"), *overrides])
    output = storage.absolute(base.output)
    uri = storage.join(output, name)
    if not base.tracking.uri and storage.local_path(output) is None:
        raise UserError(f"tracking.uri is empty but output {output} is object storage, which holds no database: give --tracking.uri")
    tracked = tracking_uri(replace(base, output=output))
    plan = Plan(space, name, storage.join(uri, "trials"), tracked, tuple(overrides), budget_seconds)
    about = {
        "recipe": space.recipe,
        "space": space.name,
        "command": redact(shlex.join(["python", *sys.argv])),
        "commit": commit(),
        "budget_seconds": budget_seconds,
        "metric": space.metric,
        "mode": space.mode,
        "overrides": list(overrides),
        "tracking_uri": tracked,
        "mlflow_parent": None,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    return Sweep(uri, plan, about)


def open_sweep(where: str, output: str) -> Sweep:
    """The sweep to resume: a sweep's id below ``output``, or its folder. Raises ``UserError`` where there is none."""
    uri = storage.absolute(where) if "/" in where else storage.join(storage.absolute(output), where)
    try:
        about: dict[str, Any] = storage.read_json(storage.join(uri, "sweep.json"))
        tree: Mapping[str, Any] = load_yaml(storage.read_bytes(storage.join(uri, "space.yaml")))
        named = (about["space"], about["tracking_uri"], tuple(about["overrides"]), about["budget_seconds"])
    except FileNotFoundError as error:
        raise UserError(f"no sweep to resume in {uri}: give --resume a sweep's id below --output, or its folder") from error
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{uri} does not hold a sweep of this version ({error}): restore its files, or start a new one") from error
    space = read_space(tree, named[0], f"{uri}/space.yaml")
    return Sweep(uri, Plan(space, storage.name(uri), storage.join(uri, "trials"), *named[1:]), about)
