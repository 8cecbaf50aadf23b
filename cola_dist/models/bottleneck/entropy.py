"""The entropy term: each token sure of its code, all codes in use."""

from __future__ import annotations

import torch
from torch import Tensor

_TEMPERATURE = 0.1
"""Share of the mean excess distance. An open choice: at 1 all tokens look undecided, near 0 only those on a border between two codes are moved."""


def entropy_term(rows: Tensor, codebook: Tensor) -> Tensor:
    """E[H(p(c|z))] - H(E[p(c|z)]) in nats, scalar, with gradient to tokens ``rows [R, D]`` and ``codebook [K, D]``, both fp32.

    The entropy penalty of LFQ (MAGVIT-v2, 2310.05737, section 3.1), for distances to codes that are trained. 0 where all tokens look alike to
    the codes; at least -log K, where each token is sure and all codes are used equally. The expectation is over the tokens of one forward,
    all slots together: a micro-batch of one worker.

    p(c|z) is a softmax over negative squared distances. Its temperature is a tenth of their mean excess over the nearest code's, over all
    tokens and codes: so the term does not change when z and codes are scaled or shifted together, and does not fade where z lies far from all
    codes. No gradient flows through the temperature.
    """
    squares = rows.square().sum(1, keepdim=True) - 2 * rows @ codebook.T + codebook.square().sum(1)
    excess = squares.detach() - squares.detach().amin(1, keepdim=True)
    log_p = torch.log_softmax(-squares / (_TEMPERATURE * excess.mean()).clamp(min=1e-12), 1)
    p = log_p.exp()
    mean = p.mean(0)
    # Codes that no token comes near have a mean of 0, where the logarithm has no gradient.
    used = -(mean * mean.clamp(min=1e-12).log()).sum()
    return -(p * log_p).sum(1).mean() - used
