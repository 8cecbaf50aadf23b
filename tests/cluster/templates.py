"""What the tests of cluster/ share: its files, the commands in them, and Ray's and the jobs' own parsers to try these on."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
JOBS_IN_IMAGE = "/opt/cola-dist/jobs/"


def documents(path: Path) -> list[Any]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def tool(name: str) -> str:
    """The path of a checker that the extra ``dev`` installs beside Python; where it is not there (never in CI), the test is skipped."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None and not os.environ.get("CI"):
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    assert found, f"{name} is not installed"
    return found


def job(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"jobs_{name}", ROOT / "jobs" / f"{name}.py")
    assert spec is not None and spec.loader is not None, f"there is no job {name}"  # noqa: PT018
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parse_job_command(words: Sequence[str]) -> None:
    """Parse ``python …/jobs/NAME.py ARGUMENTS`` as the job itself does. Raises UserError or SystemExit for what it does not know."""
    assert words[0] == "python"
    name = Path(words[1]).stem
    if name in ("cotrain", "pretrain"):
        from cola_dist.checks import check
        from cola_dist.settings import parse_job

        parsed = parse_job(words[2:], default_recipe="tiny", prog=words[1], method=name)
        if parsed.resume is None:
            check(parsed.config)
    elif name == "sweep":
        from cola_dist.recipes import build_recipe
        from cola_dist.settings import apply_overrides
        from cola_dist.train.sweep.space import load_space

        asked, overrides = job("sweep").parse(words[2:])
        if asked.resume is None:
            load_space(asked.space)
            apply_overrides(build_recipe("tiny"), overrides)
    elif name == "doctor":
        import tyro

        from jobs.doctor import Doctor

        tyro.cli(Doctor, args=words[2:])
    else:
        raise AssertionError(f"no parser for {words[1]}")


def parse_ray_command(words: Sequence[str]) -> None:
    """Parse ``ray …`` by Ray's own command line, without running it. Raises click's UsageError for what it does not know."""
    import click

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Ray Serve says of its own fields
        from ray.scripts.scripts import cli

    command: click.Command = cli
    context = click.Context(cli)
    rest = list(words[1:])
    while isinstance(command, click.Group):
        name, found, rest = command.resolve_command(context, rest)
        assert found is not None, f"ray has no command {name}"
        command = found
        context = click.Context(command, parent=context)
    command.make_parser(context).parse_args(list(rest))


def shell_commands(text: str, program: str) -> Iterator[list[str]]:
    """The words of each command in ``text`` that begins with ``program``, wherever in its line, up to what ends a command."""
    joined = re.sub(r"\\\n", " ", text)
    for line in joined.splitlines():
        code = re.sub(r"(^|\s)#.*", "", line)
        for part in re.split(r"&&|\|\||;|\||\bdo\b|\buntil\b|\bthen\b", code):
            if found := re.search(rf"(?:^|\s)({program}\s.*)", part):
                words = shlex.split(re.sub(r"\s*[12]?>.*|&\s*$|'$", "", found[1]).strip())
                yield words


def fenced(text: str) -> str:
    """The code blocks of a Markdown page."""
    return "\n".join(re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL))
