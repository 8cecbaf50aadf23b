"""Generators behind one interface."""

from collections.abc import Mapping

from cola_dist.models.world.base import WorldModel
from cola_dist.models.world.cosmos import CosmosVideo
from cola_dist.models.world.dit import SpaceTimeDiT
from cola_dist.models.world.stdit import STDiT3
from cola_dist.models.world.svd import SvdUNet
from cola_dist.models.world.wan import WanVideo

__all__ = ["KINDS", "CosmosVideo", "STDiT3", "SpaceTimeDiT", "SvdUNet", "WanVideo", "WorldModel"]

KINDS: Mapping[str, type[WorldModel]] = {kind.kind: kind for kind in (SpaceTimeDiT, STDiT3, WanVideo, CosmosVideo, SvdUNet)}
