"""Whether the generator listens: flow loss with other actions less the flow loss with the clip's own."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def sensitivity(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of ``flow_count``, ``flow_own`` and, where kept, ``flow_shuffled``, ``flow_null`` and ``flow_copy``, each per bin of tau.

    ``flow_loss`` and ``sensitivity_gap`` (shuffled less own), ``sensitivity_gap_null`` (null less own) are means over the bins with
    clips, so each part of the flow counts the same; ``flow_loss/tauI`` and ``sensitivity_gap/tauI`` are those of one bin. ``copy_loss`` is the flow
    loss of a predictor that repeats the context frame: a generator above it has learnt nothing. Empty where no clip was measured.
    """
    count = sums["flow_count"].double()
    seen = count > 0
    if not seen.any():
        return {}
    bins = torch.nonzero(seen).flatten().tolist()

    def means(values: Tensor) -> list[float]:
        return [float(value) for value in values.double()[seen] / count[seen]]

    own = means(sums["flow_own"])
    figures = {"flow_loss": sum(own) / len(own)} | {f"flow_loss/tau{index}": value for index, value in zip(bins, own, strict=True)}
    if "flow_copy" in sums:
        copy = means(sums["flow_copy"])
        figures["copy_loss"] = sum(copy) / len(copy)
        figures |= {f"copy_loss/tau{index}": value for index, value in zip(bins, copy, strict=True)}
    if "flow_shuffled" in sums:
        gaps = means(sums["flow_shuffled"] - sums["flow_own"])
        null = means(sums["flow_null"] - sums["flow_own"])
        figures["sensitivity_gap"] = sum(gaps) / len(gaps)
        figures["sensitivity_gap_null"] = sum(null) / len(null)
        figures |= {f"sensitivity_gap/tau{index}": value for index, value in zip(bins, gaps, strict=True)}
    return figures
