"""The architecture's rules, checked on the source tree, and the checks themselves, checked on small planted trees."""

from __future__ import annotations

import ast
import graphlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which rooms of the package a room may import, besides itself and those that are open to all.
OPEN = {"errors", "redact"}
MAY_IMPORT: Mapping[str, set[str]] = {
    "errors": set(),
    "redact": set(),
    "logs": set(),
    "command": {"logs"},
    "config": set(),
    "checks": {"config"},
    "arms": {"config"},
    "recipes": {"config", "arms"},
    "settings": {"config", "recipes", "arms"},
    "s3": set(),
    "storage": {"s3"},
    "chain": {"storage"},
    "spool": set(),
    "runtime": set(),
    "sender": {"spool"},
    "tracking": {"spool", "sender"},
    "data": {"storage", "config"},
    "models": {"config", "storage"},
    "methods": {"models", "config"},
    "diagnostics": {"config"},
    "evaluation": {"methods", "models", "diagnostics", "data", "settings", "storage", "tracking", "config"},
    "train": {
        *("runtime", "evaluation", "diagnostics", "methods", "models", "data"),
        *("tracking", "storage", "settings", "checks", "recipes", "arms", "config", "logs"),
    },
    "doctor": {"train", "runtime", "data", "tracking", "storage"},
    "planning": {"evaluation", "methods", "models", "data", "settings", "storage", "tracking", "config"},
    "report": {"evaluation", "tracking", "sender", "diagnostics", "arms", "storage", "config"},
}
# Where a library may be imported at all; the prefix of a path.
ONLY_IN: Mapping[str, tuple[str, ...]] = {
    "deepspeed": ("cola_dist/train/engine.py",),
    "mlflow": ("cola_dist/tracking.py", "cola_dist/sender.py"),
    "optuna": ("cola_dist/train/sweep/",),
    "boto3": ("cola_dist/storage.py", "cola_dist/s3/"),
    "botocore": ("cola_dist/storage.py", "cola_dist/s3/"),
    "ray": (
        *("cola_dist/runtime.py", "cola_dist/data/", "cola_dist/train/", "cola_dist/doctor/"),
        *("cola_dist/evaluation/", "cola_dist/planning/", "jobs/"),
    ),
    "diffusers": ("cola_dist/models/",),
}
# Libraries that may be imported inside functions only: what uses them is optional, or they take seconds.
LAZY = {"diffusers", "mlflow"}
# What these rooms need at import time, directly or through other rooms, must be there on a machine with torch alone.
BARE_ROOMS = ("models", "methods", "diagnostics")
BARE_FORBIDDEN = {"ray", "deepspeed", "mlflow", "boto3", "botocore", "diffusers"}
FILE_LINES, FUNCTION_LINES, JOB_LINES = 400, 60, 99
FILES = {"pyproject.toml", "README.md", "LICENSE", "Makefile", "CONTRIBUTING.md", "SECURITY.md", ".gitignore"}
TOP_LEVEL = FILES | {"cola_dist", "cluster", "jobs", "tests", ".ci"}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """(path from the root, syntax tree) of every source file that the rules hold for."""
    for folder in ("cola_dist", "jobs", "cluster"):
        for path in sorted((root / folder).rglob("*.py")):
            yield path.relative_to(root).as_posix(), ast.parse(path.read_text(), str(path))


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(tree: ast.Module, path: str, modules: set[str]) -> Iterator[tuple[str, int, bool]]:
    """(imported module, line, whether at import time) of every import; ``from package import module`` counts as the module."""
    lazy = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(outer)}
    lazy |= {id(node) for block in ast.walk(tree) if isinstance(block, ast.If) and is_type_checking(block) for node in ast.walk(block)}
    package = module_name(path).split(".") if path.endswith("__init__.py") else module_name(path).split(".")[:-1]
    for node in ast.walk(tree):
        eager = id(node) not in lazy
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno, eager
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                yield (f"{name}.{alias.name}" if f"{name}.{alias.name}" in modules else name), node.lineno, eager


def is_type_checking(block: ast.If) -> bool:
    return ast.unparse(block.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if parts[0] == "cola_dist" and len(parts) > 1 else parts[0]


def wrong_imports(root: Path) -> list[str]:
    """Rules 1 to 3: a room's own imports, and libraries outside the rooms that they belong to."""
    found = []
    modules = {module_name(path) for path, _ in sources(root)}
    for path, tree in sources(root):
        here = room(module_name(path))
        if path.startswith("cola_dist/") and here not in {"cola_dist", *MAY_IMPORT}:
            found.append(f"{path}: {here} is no room of the architecture")
        for name, line, eager in imports(tree, path, modules):
            library = name.split(".")[0]
            if library in ONLY_IN and not path.startswith(ONLY_IN[library]):
                found.append(f"{path}:{line}: {library} may be imported in {', '.join(ONLY_IN[library])} only")
            elif library in LAZY and eager:
                found.append(f"{path}:{line}: {library} may be imported inside functions only")
            if library in ("jobs", "cluster", "tests") and path.startswith("cola_dist/"):
                found.append(f"{path}:{line}: the package may not import {library}")
            inside = here in MAY_IMPORT and library == "cola_dist"
            if inside and room(name) not in {here} | OPEN | MAY_IMPORT[here]:
                found.append(f"{path}:{line}: {here} may not import {room(name)}")
    return found


def import_cycles(root: Path) -> list[str]:
    """Rule 3: no module imports itself through others, not even inside functions."""
    trees = dict(sources(root))
    modules = {module_name(path) for path in trees}
    graph = {
        module_name(path): {name for name, _, _ in imports(tree, path, modules) if name in modules and name != module_name(path)}
        for path, tree in trees.items()
    }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return ["cycle: " + " -> ".join(reversed(error.args[1]))]
    return []


def heavy_imports(root: Path) -> list[str]:
    """Rule 1: libraries that a bare room needs at import time through any chain of modules."""
    trees = dict(sources(root))
    modules = {module_name(path) for path in trees}
    eager = {module_name(path): {name for name, _, now in imports(tree, path, modules) if now} for path, tree in trees.items()}
    found = []
    for start in sorted(modules):
        if not start.startswith("cola_dist.") or room(start) not in BARE_ROOMS:
            continue
        seen, todo = set(), [start]
        while todo:
            name = todo.pop()
            if name in seen:
                continue
            seen.add(name)
            parents = {".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)} & modules
            todo += [*eager.get(name, ()), *parents]
        found += [f"{start} needs {library} at import time" for library in sorted({name.split(".")[0] for name in seen} & BARE_FORBIDDEN)]
    return found


def long_code(root: Path) -> list[str]:
    """Rule 4: files and functions that are too long."""
    found = []
    for path, tree in sources(root):
        lines = len((root / path).read_text().splitlines())
        limit = JOB_LINES if path.startswith("jobs/") else FILE_LINES
        if lines > limit:
            found.append(f"{path}: {lines} lines, at most {limit}")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    found.append(f"{path}:{node.lineno}: {node.name} has {length} lines, at most {FUNCTION_LINES}")
    return found


def config_fields(root: Path) -> set[str]:
    """Names of all fields in the configuration tree."""
    trees = [ast.parse(path.read_text()) for path in sorted((root / "cola_dist" / "config").glob("*.py"))]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return {
        item.target.id for node in classes for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    }


def defaulted_config_reads(root: Path) -> list[str]:
    """Rule 5: ``getattr`` with a default on something called a configuration, or for the name of a configuration field."""
    fields = config_fields(root)
    found = []
    for path, tree in sources(root):
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) == 3):
                continue
            of_config = re.search(r"(?i)\b(\w*config|cfg|settings|recipe)\b", ast.unparse(node.args[0]))
            if of_config or (isinstance(node.args[1], ast.Constant) and node.args[1].value in fields):
                found.append(f"{path}:{node.lineno}: {ast.unparse(node)} hides a missing configuration field")
    return found


def undeclared_and_unused(root: Path) -> list[str]:
    """Dependencies that pyproject.toml lacks, or has although nothing imports them. Extras count for what is imported in functions."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    needed = {distribution(requirement) for requirement in project["dependencies"]}
    optional = {distribution(requirement) for extra in project.get("optional-dependencies", {}).values() for requirement in extra}
    owners = importlib.metadata.packages_distributions()
    own = {"cola_dist"} | {path.stem for path in (root / "jobs").glob("*.py")}
    found, used = [], set()
    for path, tree in sources(root):
        for name, line, eager in imports(tree, path, set()):
            library = name.split(".")[0]
            if library in own or library in sys.stdlib_module_names:
                continue
            holders = {distribution(owner) for owner in owners.get(library, [library])}
            used |= holders
            if not holders & (needed if eager else needed | optional):
                found.append(f"{path}:{line}: {library} is not among the dependencies")
    return found + [f"pyproject.toml: nothing imports {name}" for name in sorted(needed - used)]


def distribution(requirement: str) -> str:
    """The normal form of a requirement's name."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement, maxsplit=1)[0]).lower()


def test_imports_run_downwards_and_libraries_stay_in_their_rooms() -> None:
    assert wrong_imports(ROOT) == []


def test_no_import_cycles() -> None:
    assert import_cycles(ROOT) == []


def test_models_methods_and_diagnostics_need_torch_alone() -> None:
    assert heavy_imports(ROOT) == []


def test_files_and_functions_are_short() -> None:
    assert long_code(ROOT) == []


def test_no_configuration_field_is_read_with_a_default() -> None:
    assert defaulted_config_reads(ROOT) == []


def test_dependencies_are_declared_and_used() -> None:
    assert undeclared_and_unused(ROOT) == []


def test_top_level_holds_the_agreed_names_only() -> None:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    assert {line.split("/")[0] for line in listing.stdout.splitlines()} - TOP_LEVEL == set()


def plant(root: Path, files: Mapping[str, str]) -> Path:
    """A small tree with ``files`` in it, beside an empty configuration."""
    for path, text in {"cola_dist/config/run.py": "", **files}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    return root


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("cola_dist/models/lam.py", "import ray", "ray may be imported in"),
        ("cola_dist/methods/base.py", "def f():\n    import deepspeed", "deepspeed may be imported in"),
        ("cola_dist/train/loop.py", "from deepspeed.utils import x", "deepspeed may be imported in"),
        ("cola_dist/evaluation/probe.py", "from mlflow import x", "mlflow may be imported in"),
        ("cola_dist/data/shards.py", "import boto3", "boto3 may be imported in"),
        ("cola_dist/recipes.py", "import ray", "ray may be imported in"),
        ("cluster/start.py", "import ray", "ray may be imported in"),
        ("cola_dist/train/loop.py", "import diffusers", "diffusers may be imported in"),
        ("cola_dist/models/autoencoder.py", "import diffusers", "inside functions only"),
        ("cola_dist/tracking.py", "if True:\n    import mlflow", "inside functions only"),
        ("cola_dist/models/lam.py", "from cola_dist.methods import base", "models may not import methods"),
        ("cola_dist/models/lam.py", "from cola_dist import train", "models may not import train"),
        ("cola_dist/models/lam.py", "from ..data import shards", "models may not import data"),
        ("cola_dist/models/world/dit.py", "from ...data import shards", "models may not import data"),
        ("cola_dist/config/run.py", "def f():\n    from cola_dist.recipes import tiny", "config may not import recipes"),
        ("cola_dist/errors.py", "import cola_dist.config", "errors may not import config"),
        ("cola_dist/extras.py", "", "extras is no room"),
        ("cola_dist/train/loop.py", "from jobs.cotrain import main", "may not import jobs"),
    ],
)
def test_wrong_imports_are_found(tmp_path: Path, path: str, source: str, complaint: str) -> None:
    train = {"cola_dist/train/__init__.py": "", "cola_dist/train/other.py": ""}
    found = wrong_imports(plant(tmp_path, {**train, path: source}))
    assert len(found) == 1
    assert found[0].startswith(path)
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cola_dist/train/engine.py", "import deepspeed"),
        ("cola_dist/tracking.py", "def f():\n    import mlflow"),
        ("cola_dist/storage.py", "import boto3\nfrom cola_dist.errors import UserError"),
        ("cola_dist/data/stream.py", "import ray.data\nfrom cola_dist.data import shards\nfrom . import order"),
        ("cola_dist/models/autoencoder.py", "def f():\n    import diffusers"),
        ("jobs/cotrain.py", "import ray\nfrom cola_dist.train import launch"),
        ("cola_dist/data/stream.py", "import rayon"),
    ],
)
def test_right_imports_pass(tmp_path: Path, path: str, source: str) -> None:
    assert wrong_imports(plant(tmp_path, {path: source})) == []


def test_cycles_are_found(tmp_path: Path) -> None:
    files = {
        "cola_dist/data/a.py": "from cola_dist.data import b",
        "cola_dist/data/b.py": "def f():\n    from cola_dist.data.c import g",
        "cola_dist/data/c.py": "import cola_dist.data.a",
    }
    (cycle,) = import_cycles(plant(tmp_path, files))
    assert all(f"cola_dist.data.{name}" in cycle for name in "abc")
    (tmp_path / "cola_dist/data/c.py").write_text("")
    assert import_cycles(tmp_path) == []


def test_heavy_imports_are_found_through_other_rooms_and_packages(tmp_path: Path) -> None:
    files = {
        "cola_dist/storage.py": "import boto3",
        "cola_dist/models/world/__init__.py": "from cola_dist import storage",
        "cola_dist/models/world/dit.py": "",
        "cola_dist/models/lazy.py": "def f():\n    from cola_dist import storage",
    }
    found = heavy_imports(plant(tmp_path, files))
    assert found == [f"cola_dist.models.world{name} needs boto3 at import time" for name in ("", ".dit")]


def test_long_code_is_found(tmp_path: Path) -> None:
    files = {
        "cola_dist/data/long.py": "x = 1\n" * (FILE_LINES + 1),
        "cola_dist/data/fits.py": "x = 1\n" * FILE_LINES,
        "jobs/long.py": "x = 1\n" * 100,
        "cola_dist/data/functions.py": "class A:\n    def long(self):\n"
        + "        x = 1\n" * 60
        + "\n\ndef fits():\n"
        + "    x = 1\n" * 59,
    }
    found = long_code(plant(tmp_path, files))
    assert [line.split(":")[0] for line in found] == ["cola_dist/data/functions.py", "cola_dist/data/long.py", "jobs/long.py"]
    assert "long has 61 lines" in found[0]


def test_defaulted_configuration_reads_are_found(tmp_path: Path) -> None:
    source = "\n".join(
        [
            "getattr(config, name, 0)",
            "getattr(self.config.train, name, 0)",
            "getattr(anything, 'zero_stage', 0)",
            "getattr(config, name)",
            "getattr(module, 'weight', None)",
        ]
    )
    files = {"cola_dist/config/run.py": "class TrainConfig:\n    zero_stage: int = 2\n", "cola_dist/train/loop.py": source}
    found = defaulted_config_reads(plant(tmp_path, files))
    assert [line.split(":")[1] for line in found] == ["1", "2", "3"]


def test_undeclared_and_unused_dependencies_are_found(tmp_path: Path) -> None:
    project = '[project]\ndependencies = ["torch==2.13.0", "pyyaml>=6,<7", "rich"]\n[project.optional-dependencies]\ndev = ["pytest"]\n'
    source = "import json, yaml, numpy, pytest\nfrom cola_dist import config\n\ndef f():\n    import torch, pytest\n"
    found = undeclared_and_unused(plant(tmp_path, {"pyproject.toml": project, "cola_dist/data/a.py": source}))
    assert found == [
        "cola_dist/data/a.py:1: numpy is not among the dependencies",
        "cola_dist/data/a.py:1: pytest is not among the dependencies",
        "pyproject.toml: nothing imports rich",
    ]
