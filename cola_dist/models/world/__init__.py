"""Generators behind one interface."""

from cola_dist.models.world.base import WorldModel
from cola_dist.models.world.dit import SpaceTimeDiT

__all__ = ["SpaceTimeDiT", "WorldModel"]
