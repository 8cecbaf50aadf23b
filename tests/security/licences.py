"""Licences of what is installed to run the project: ``python -m tests.security.licences`` prints them, and fails for one that is not allowed.

Read from the installed packages by pip-licenses, so it needs no network. A package's own statement is taken as it is; what a wheel carries besides is
not in it (SECURITY.md names one).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = ("cluster",)
"""Of the project: what nodes install. The simulators' and the developers' are on no node."""
ALLOWED = {
    *(
        "mit",
        "mit license",
        "mit-0",
        "mit-cmu",
        "0bsd",
        "bsd license",
        "3-clause bsd license",
        "bsd-2-clause",
        "bsd-3-clause",
        "isc",
        "zlib",
    ),
    *("apache 2.0", "apache-2.0", "apache license 2.0", "apache software license", "apache software license 2.0"),
    *("apache-2.0 with llvm-exception", "bsl-1.0", "cc0-1.0", "cnri-python", "psf-2.0", "python software foundation license"),
    *("the unlicense (unlicense)", "unlicense", "academic free license (afl)", "isc license (iscl)"),
    # Copyleft that ends at the file.
    *("mpl-2.0", "mozilla public license 2.0 (mpl 2.0)"),
}
"""Names as packages write them, in lower case. Copyleft that reaches what is linked (GPL, AGPL, LGPL) is not among them."""
READ_BY_HAND = {"huey": "MIT", "skops": "MIT"}
"""What packages that state none have in their LICENSE file."""
_NAMES = {name.strip("() ") for name in ALLOWED}


@dataclass(frozen=True)
class Package:
    """An installed package and what it says of its licence."""

    name: str
    version: str
    licence: str

    @property
    def allowed(self) -> bool:
        """Whether all that applies at once is allowed, of alternatives one."""
        return is_allowed(self.licence)


def is_allowed(licence: str) -> bool:
    """Of an SPDX expression or of classifiers joined by semicolons, which say no more than that all of them apply to something."""
    parts = re.split(r"\s+AND\s+|\s*;\s*", licence.strip())
    return all(any(choice.strip("() ").lower() in _NAMES for choice in re.split(r"\s+OR\s+", part)) for part in parts)


def needed() -> list[str]:
    """Names of all packages that the project needs to run, directly or through others, as far as they are installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    todo = [*project["dependencies"], *(requirement for extra in EXTRAS for requirement in project["optional-dependencies"][extra])]
    waiting, seen = [Requirement(text) for text in todo], set[tuple[str, frozenset[str]]]()
    while waiting:
        requirement = waiting.pop()
        key = (re.sub(r"[-_.]+", "-", requirement.name).lower(), frozenset(requirement.extras))
        if key in seen:
            continue
        try:
            waiting += _of(importlib.metadata.requires(requirement.name) or [], requirement.extras)
        except importlib.metadata.PackageNotFoundError:
            continue
        seen.add(key)
    return sorted({name for name, _ in seen})


def _of(requirements: Sequence[str], extras: set[str]) -> Iterator[Requirement]:
    """Those that hold here, without extras or with these."""
    for requirement in map(Requirement, requirements):
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield requirement


def packages(names: Sequence[str]) -> list[Package]:
    """What pip-licenses reads of these packages."""
    command = [sys.executable, "-m", "piplicenses", "--from=mixed", "--format=json", "--with-system", "--packages", *names]
    listed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return [Package(one["Name"], one["Version"], READ_BY_HAND.get(one["Name"], one["License"])) for one in listed]


def main() -> int:
    found = packages(needed())
    for one in found:
        print(f"{one.name} {one.version}: {one.licence}{'' if one.allowed else '  <- not allowed'}")
    print("\n" + "\n".join(f"{count:4d}  {licence}" for licence, count in Counter(one.licence for one in found).most_common()))
    return 0 if all(one.allowed for one in found) else 1


if __name__ == "__main__":
    sys.exit(main())
