"""What jobs/evaluate.py, jobs/adapt.py and jobs/plan.py left behind, as a page tells it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cola_dist import storage
from cola_dist.errors import UserError

Kind = Literal["evaluation", "adaptation", "plans"]


@dataclass(frozen=True)
class Judgement:
    """One folder of results, read."""

    uri: str
    kind: Kind
    found: Any
    """What its JSON file holds: of an evaluation or of plans an object, of an adaptation its points by growing share of episodes."""


def read_judgement(folder: str) -> Judgement | None:
    """What the folder (path or URI) holds; none where it is something else. Raises ``UserError`` for a file that is damaged."""
    results, curve = storage.join(folder, "results.json"), storage.join(folder, "curve.json")
    if storage.exists(curve):
        points = _read(curve)
        if not isinstance(points, list) or not points or not all(isinstance(point, dict) and "share" in point for point in points):
            raise UserError(f"{curve}: holds no points of shares of episodes: let jobs/adapt.py --shares make it again, or leave it out")
        return Judgement(folder, "adaptation", points)
    if not storage.exists(results):
        return None
    found = _read(results)
    kinds: tuple[tuple[Kind, set[str]], ...] = (("evaluation", {"protocol", "figures", "probe"}), ("plans", {"request", "models", "pairs"}))
    for kind, keys in kinds:
        if isinstance(found, dict) and keys <= found.keys():
            if kind == "plans":
                _check_films(found["models"], results)
            return Judgement(folder, kind, found)
    raise UserError(f"{results}: neither an evaluation nor plans: let jobs/evaluate.py or jobs/plan.py make it again, or leave it out")


def _check_films(models: Any, uri: str) -> None:
    """Raises ``UserError`` for a film that lies elsewhere: it would become part of a page, which is there to be passed on."""
    try:
        names = [name for figures in models.values() for name in figures["videos"].values()]
        sound = not any({"", ".", ".."} & set(name.split("/")) for name in names)
    except (AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        raise UserError(f"{uri}: names films that are not below this folder: let jobs/plan.py make it again, or leave it out")


def of_kind(judged: Sequence[Judgement], kind: Kind) -> list[Judgement]:
    """Those of one kind, in their order."""
    return [one for one in judged if one.kind == kind]


def _read(uri: str) -> Any:
    try:
        return storage.read_json(uri)
    except ValueError as error:
        raise UserError(f"{uri}: not JSON ({error}): restore it, or leave this folder out") from error
