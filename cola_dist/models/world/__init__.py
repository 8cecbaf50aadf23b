"""Generators behind one interface."""

from collections.abc import Mapping

from cola_dist.models.world.base import WorldModel
from cola_dist.models.world.dit import SpaceTimeDiT
from cola_dist.models.world.stdit import STDiT3

__all__ = ["KINDS", "STDiT3", "SpaceTimeDiT", "WorldModel"]

KINDS: Mapping[str, type[WorldModel]] = {kind.kind: kind for kind in (SpaceTimeDiT, STDiT3)}
