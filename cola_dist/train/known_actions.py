"""The probe of a run: what its codes tell of the true actions of clips that have some. Actions are used for nothing else."""

from __future__ import annotations

from dataclasses import replace

import torch

from cola_dist.config import RunConfig
from cola_dist.diagnostics.alignment import plugin_mutual_information, true_action_perplexity
from cola_dist.evaluation import probe
from cola_dist.evaluation.known import known_rows
from cola_dist.methods.cotrain import CoTrain

_BINS = 8
"""Cells that each dimension of an action is cut into, where actions are counted."""
_NAMES = {"codes": "", "random_idm": "_random_idm", "frame_difference": "_frame_difference", "permuted": "_permuted"}


def probe_actions(config: RunConfig, method: CoTrain, device: torch.device) -> dict[str, float]:
    """What the codes tell of true actions; empty without a source that has actions in both splits.

    ``probe_r2…``: R2 of ridge maps from codes to the actions of held-out episodes, with controls; ``probe_r2`` is for the signed components
    (where to), ``probe_r2_size`` for the action's norm (how much). ``action_information`` (nats, less its permuted control),
    ``action_information_share`` (of the actions' entropy) and ``action_perplexity`` (of the true actions, in cells) count all those clips.
    """
    # By the first mixture alone: looks before and after a stage must be of the same clips.
    rows = known_rows(replace(config.data, stages={}), config.train.seed, config.diagnostics.probe_clips // 2, device)
    if rows is None:
        return {}
    features = {
        "codes": probe.code_features(method.lam, rows.video),
        "random_idm": probe.code_features(probe.untrained_lam(config, rows.video), rows.video),
        "frame_difference": probe.difference_features(rows.video),
    }
    features = {name: values.cpu() for name, values in features.items()}
    found: dict[str, float] = {}
    for target, values in (("probe_r2", rows.actions), ("probe_r2_size", rows.actions.norm(dim=1, keepdim=True))):
        scores = probe.probe_with_controls(features, values, rows.episode, rows.heldout, config.train.seed)
        found |= {f"{target}{_NAMES[name]}": score.r2 for name, score in scores.items()}
    found["action_perplexity"] = true_action_perplexity(rows.actions, _BINS)
    codes = probe.codes_of(method.lam, rows.video).cpu()
    if codes.shape[1]:
        known = plugin_mutual_information(codes, rows.actions, rows.episode, method.lam.bottleneck.codes, _BINS, config.train.seed)
        found |= {"action_information": known.corrected, "action_information_permuted": known.permuted_mean}
        found["action_information_share"] = known.normalised
    return found
