"""How the codes are used and how the latent actions spread."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def entropy(counts: Tensor) -> Tensor:
    """Entropy in nats of histograms ``[..., K]``; 0 for an empty one."""
    share = counts.double() / counts.double().sum(-1, keepdim=True).clamp(min=1)
    nats: Tensor = torch.special.entr(share).sum(-1)
    return nats


def code_usage(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of ``code_counts [N, K]`` and, where kept, ``joint_counts``.

    ``utilisation`` (share of codes ever used), ``max_usage`` (share of the most used code), ``entropy`` (nats) and ``perplexity`` are
    means over the N slots; ``NAME/slotI`` are those of one slot, ``perplexity/joint`` that of all slots together.
    """
    counts = sums["code_counts"].double()
    entropies = entropy(counts)
    slots = {
        "utilisation": (counts > 0).double().mean(-1),
        "max_usage": counts.amax(-1) / counts.sum(-1).clamp(min=1),
        "entropy": entropies,
        "perplexity": entropies.exp(),
    }
    figures: dict[str, float] = {}
    for name, values in slots.items():
        figures[name] = float(values.mean())
        figures |= {f"{name}/slot{slot}": float(value) for slot, value in enumerate(values)}
    if "joint_counts" in sums:
        figures["perplexity/joint"] = float(entropy(sums["joint_counts"]).exp())
    return figures


def latent_spread(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """Figures of the tokens z, from ``z_count []``, ``z_sum [D]`` and ``z_outer [D, D]``.

    ``effective_rank``: exp of the entropy of the normalised singular values of z less its mean (Roy & Vetterli 2007; as RankMe,
    2210.02885, which keeps the mean); 0 where z does not vary. ``z_std``: mean standard deviation; ``z_variance_hinge``: mean of max(0, 1
    - std); ``z_offdiag_cov``: squared off-diagonal covariances, summed, by D (VICReg, 2105.04906).
    """
    count = sums["z_count"].double().clamp(min=1)
    mean = sums["z_sum"].double() / count
    covariance = sums["z_outer"].double() / count - torch.outer(mean, mean)
    variance = covariance.diagonal().clamp(min=0)
    std = variance.sqrt()
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    # Below this share of the mean square the sums have no digits left: what remains is rounding, not variation.
    noise = 1e-12 * (sums["z_outer"].double().diagonal().sum() / count)
    eigenvalues = torch.where(eigenvalues > noise, eigenvalues, 0.0)
    singular = eigenvalues.sqrt()
    rank = float(entropy(singular / singular.sum()).exp()) if singular.sum() > 0 else 0.0
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    return {
        "effective_rank": rank,
        "z_std": float(std.mean()),
        "z_variance_hinge": float((1 - std).clamp(min=0).mean()),
        "z_offdiag_cov": float(off_diagonal.square().sum() / len(std)),
    }
