"""Make a JSON schema of a published CustomResourceDefinition: ``python trim.py CRD.yaml > SCHEMA.json``.

Kept is all of the schema of version v1 but ``status``, which no manifest holds. Parts that occur more than once (the CRDs spell a pod out wherever
there is one) are written once and referred to; nothing else is changed.
"""

from __future__ import annotations

import collections
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_SMALLEST = 400
"""Characters of JSON below which a part is rather repeated than referred to."""


def trim(crd: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON schema of the CRD's version v1."""
    (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
    schema = version["schema"]["openAPIV3Schema"]
    schema["properties"].pop("status")
    counts: collections.Counter[str] = collections.Counter()
    _count(schema, counts)
    names: dict[str, str] = {}
    parts: dict[str, Any] = {}
    whole = _refer(schema, counts, names, parts, root=True)
    return {"$schema": "http://json-schema.org/draft-07/schema#", **whole, "$defs": parts}


def _count(node: Any, counts: collections.Counter[str]) -> None:
    if isinstance(node, dict):
        if "type" in node and len(text := json.dumps(node, sort_keys=True)) >= _SMALLEST:
            counts[text] += 1
        for item in node.values():
            _count(item, counts)
    elif isinstance(node, list):
        for item in node:
            _count(item, counts)


def _refer(node: Any, counts: Mapping[str, int], names: dict[str, str], parts: dict[str, Any], root: bool = False) -> Any:
    if isinstance(node, list):
        return [_refer(item, counts, names, parts) for item in node]
    if not isinstance(node, dict):
        return node
    text = json.dumps(node, sort_keys=True) if "type" in node and not root else ""
    if counts.get(text, 0) < 2:
        return {key: _refer(item, counts, names, parts) for key, item in node.items()}
    if text not in names:
        names[text] = f"part{len(names)}"
        parts[names[text]] = {key: _refer(item, counts, names, parts) for key, item in node.items()}
    return {"$ref": f"#/$defs/{names[text]}"}


if __name__ == "__main__":
    json.dump(trim(yaml.load(Path(sys.argv[1]).read_text(), yaml.CSafeLoader)), sys.stdout, separators=(",", ":"))
    sys.stdout.write("\n")
