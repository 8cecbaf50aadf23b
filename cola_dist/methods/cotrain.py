"""Co-training of latent action model and generator (CoLA-World, arXiv 2510.26433): warm-up with the generator frozen, then both."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.methods.base import Clips, Method, StepOutput
from cola_dist.methods.draws import Draws
from cola_dist.methods.pretrain import TAU_BINS, bin_times
from cola_dist.models.autoencoder import PixelAutoencoder, to_pixels
from cola_dist.models.bottleneck import Quantised
from cola_dist.models.flow import flow_loss, frame_times, noised
from cola_dist.models.lam import LatentActionModel
from cola_dist.models.world import WorldModel

MAX_JOINT_CODES = 2**16
"""Above this many joint actions K**N their histogram is not kept."""


def other_clip(source: Tensor) -> Tensor:
    """For each clip of a batch (``source [B]``, B >= 2) the index of another one, int64 ``[B]``: the next of the same source, round robin.

    A clip that is alone in its source gets the clip after it in order of source. No clip gets itself.
    """
    order = torch.argsort(source, stable=True)
    following = order.roll(-1)
    _, sizes = torch.unique_consecutive(source[order], return_counts=True)
    ends = sizes.cumsum(0)
    several = sizes > 1
    following[ends[several] - 1] = order[(ends - sizes)[several]]
    return torch.empty_like(order).scatter_(0, order, following)


class CoTrain(Method):
    """Roles "lam" (inverse dynamics, codebook, action conditioning) and "world" (the generator); one loss.

    ``L = L_fm + w_code * ||sg[z] - e||^2 + w_commit * ||z - sg[e]||^2``, the squared norms as means over elements.
    """

    def __init__(self, config: RunConfig, bf16: bool, lam: LatentActionModel, world: WorldModel) -> None:
        super().__init__(bf16)
        self.config = config
        self.autoencoder = PixelAutoencoder()
        self.lam = lam
        self.world = world

    def roles(self) -> tuple[str, ...]:
        return ("lam", "world")

    def forward(self, clips: Clips, step: int) -> StepOutput:
        device = clips.video.device
        draws = Draws(self.config.train.seed, clips.position, device)
        weights = self.config.lam.bottleneck
        with self._autocast(device):
            x0 = self.autoencoder.encode(clips.video)
            _, quantised = self.lam.infer(to_pixels(clips.video), step)
            dropped = draws.dropped(self.config.conditioning.dropout, clips.video.shape[1] - 1)
            modulation = self.lam.conditioning(quantised.actions, dropped)
            eps = draws.normal("noise", *x0.shape[1:])
            tau, generated = frame_times(draws.flow_time(self.config.flow), draws.context(self.config.flow, x0.shape[1]), x0.shape[1])
            flow = flow_loss(self.world(noised(x0, eps, tau), tau, modulation), x0, eps, generated).mean()
        loss = flow + weights.codebook_weight * quantised.codebook_loss + weights.commitment_weight * quantised.commitment_loss
        metrics = {
            "loss": loss.detach(),
            "flow_loss": flow.detach(),
            "codebook_loss": quantised.codebook_loss.detach(),
            "commitment_loss": quantised.commitment_loss.detach(),
        }
        return StepOutput(loss, metrics, quantised.codes)

    @torch.no_grad()
    def evaluate(self, clips: Clips) -> dict[str, Tensor]:
        """Sums over clips, float64, for `cola_dist.diagnostics` (M transitions of N tokens of D dimensions, K codes).

        ``code_counts [N, K]``, ``joint_counts [K**N]`` (if at most 65,536), ``z_count []``, ``z_sum [D]``, ``z_outer [D, D]`` over
        tokens; ``flow_count``, ``flow_own``, ``flow_shuffled``, ``flow_null`` per bin of tau ``[4]``: flow loss after one context frame
        with the clip's own actions, with another clip's (`other_clip`) and with the null action, at the same noise and tau. Each clip is
        measured in two of the four bins, even or odd ones by its position: that halves the cost of all four and keeps each comparison
        paired. A batch of one clip has no other clip and adds nothing to the flow sums.
        """
        device = clips.video.device
        with self._autocast(device):
            z, quantised = self.lam.infer(to_pixels(clips.video))
            sums = self._code_sums(z, quantised)
            sums |= self._flow_sums(clips, quantised)
        return sums

    def _code_sums(self, z: Tensor, quantised: Quantised) -> dict[str, Tensor]:
        codes = quantised.codes.flatten(0, 1)
        k, n = self.config.lam.bottleneck.codes, codes.shape[1]
        slots = torch.stack([torch.bincount(codes[:, slot], minlength=k) for slot in range(n)])
        sums = {"code_counts": slots.double()}
        if k**n <= MAX_JOINT_CODES:
            joint = (codes * k ** torch.arange(n, device=codes.device)).sum(1)
            sums["joint_counts"] = torch.bincount(joint, minlength=k**n).double()
        rows = z.flatten(0, 2).double()
        return sums | {
            "z_count": torch.tensor(len(rows), dtype=torch.float64, device=z.device),
            "z_sum": rows.sum(0),
            "z_outer": rows.T @ rows,
        }

    def _flow_sums(self, clips: Clips, quantised: Quantised) -> dict[str, Tensor]:
        device = clips.video.device
        sums = {
            name: torch.zeros(TAU_BINS, dtype=torch.float64, device=device)
            for name in ("flow_count", "flow_own", "flow_shuffled", "flow_null")
        }
        if len(clips) < 2:
            return sums
        x0 = self.autoencoder.encode(clips.video)
        eps = Draws(self.config.train.seed, clips.position, device).normal("noise", *x0.shape[1:])
        own = quantised.actions
        null = self.lam.conditioning.null_actions(*own.shape[:2])
        modulations = {
            "flow_own": self.lam.conditioning(own),
            "flow_shuffled": self.lam.conditioning(own[other_clip(clips.source)]),
            "flow_null": self.lam.conditioning(null),
        }
        for half in range(2):
            bins = clips.position % 2 + 2 * half
            tau, generated = frame_times(bin_times(self.config.flow.tau_min, bins), torch.ones_like(bins), x0.shape[1])
            x_tau = noised(x0, eps, tau)
            sums["flow_count"].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
            for name, modulation in modulations.items():
                loss = flow_loss(self.world(x_tau, tau, modulation), x0, eps, generated)
                sums[name].index_add_(0, bins, loss.double())
        return sums
