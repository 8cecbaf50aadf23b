"""A world model that is driven by a robot's real actions, as planning needs it."""

from __future__ import annotations

import copy

import torch

from cola_dist.errors import UserError
from cola_dist.evaluation.exported import load_export
from cola_dist.methods.adapt import Adapt
from cola_dist.methods.cotrain import CoTrain
from cola_dist.models.adapter import ActionAdapter


def load_adapted(uri: str, device: torch.device) -> tuple[CoTrain, ActionAdapter]:
    """The method of a run of jobs/adapt.py (its folder, or its export) for `cola_dist.evaluation.rollout.generate`, and its adapter, on ``device``.

    ``adapter(actions)`` takes real actions ``[B, T-1, A]`` fp32 in the robot's own units, ``adapter(actions, state)`` the states ``[B, T-1, S]``
    before them too, where ``adapter.state_dim`` is not 0. Both return the latent actions ``[B, T-1, N, D]`` that the generator was tuned on: the
    LAM's codes with ``adapt.quantise``. Raises `UserError` for what is no such run.
    """
    method = load_export(uri, device)
    if not isinstance(method, Adapt):
        raise UserError(f"{uri} has no adapter: make one with `python jobs/adapt.py {uri}` and give that run")
    # A copy: the method rounds for itself.
    adapter = copy.deepcopy(method.adapter)
    adapter.snaps_to = method.lam.bottleneck if method.config.adapt.quantise else None
    return method, adapter
