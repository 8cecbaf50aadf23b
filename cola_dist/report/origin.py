"""What made a page: the command, the commit of the code, the versions of what it computes with."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_VERSIONS = ("cola-dist", "numpy", "scipy", "matplotlib")


@dataclass(frozen=True)
class Origin:
    """Where a page comes from."""

    command: str
    commit: str
    """Of the checkout that the package runs from, ``+changes`` where files differ from it; empty where it is none."""
    versions: Mapping[str, str]


def origin(argv: Sequence[str]) -> Origin:
    """That of this process, which was called with ``argv``."""
    versions = {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _VERSIONS}
    commit = _git("rev-parse", "HEAD")
    changed = "+changes" if commit and _git("status", "--porcelain", "--untracked-files=no") else ""
    return Origin(shlex.join(argv), commit + changed, versions)


def _git(*words: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
