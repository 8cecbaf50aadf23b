"""Every package that is installed to run the project has a licence that is allowed."""

from __future__ import annotations

import re
import tomllib

import pytest

from tests.security.licences import ROOT, is_allowed, needed, packages


def test_licences_of_what_runs_are_allowed() -> None:
    names = needed()
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {re.split(r"[\[<>=]", requirement)[0] for requirement in declared} <= set(names)
    assert len(names) > 100, "those that others need are among them"
    found = packages(names)
    assert {re.sub(r"[-_.]+", "-", one.name).lower() for one in found} == set(names)
    assert [f"{one.name}: {one.licence}" for one in found if not one.allowed] == []


@pytest.mark.parametrize(
    ("licence", "allowed"),
    [
        ("MIT", True),
        ("Apache-2.0 OR BSD-3-Clause", True),
        ("MIT OR GPL-3.0-only", True),
        ("Apache-2.0 AND (MIT OR GPL-2.0-or-later)", True),
        ("Apache Software License; BSD License", True),
        ("MPL-2.0 AND MIT", True),
        ("UNKNOWN", False),
        ("", False),
        ("GPL-3.0-or-later", False),
        ("MIT AND AGPL-3.0-only", False),
        ("GNU Lesser General Public License v3 (LGPLv3)", False),
        ("MIT License; GNU General Public License v2 (GPLv2)", False),
        ("Proprietary License", False),
    ],
)
def test_what_an_expression_allows(licence: str, allowed: bool) -> None:
    assert is_allowed(licence) == allowed
