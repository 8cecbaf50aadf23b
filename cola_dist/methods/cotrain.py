"""Co-training of latent action model and generator (CoLA-World, arXiv 2510.26433): warm-up with the generator frozen, then both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from cola_dist.config import RunConfig
from cola_dist.methods.base import Clips, Method, StepOutput
from cola_dist.methods.draws import Draws
from cola_dist.methods.objective import motion_weights, ranking_loss
from cola_dist.methods.pretrain import TAU_BINS, bin_times
from cola_dist.methods.schedule import Phase
from cola_dist.models.autoencoder import Autoencoder, to_pixels
from cola_dist.models.bottleneck import Quantised
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.flow import flow_loss, frame_times, noised, still_velocity
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
    """Roles "lam" (inverse dynamics, codebook, forward model), "conditioning" and "world" (the generator); one loss.

    ``L = L_fm + L_bottleneck``, for the faithful kind ``w_code * ||sg[z] - e||^2 + w_commit * ||z - sg[e]||^2`` with means over elements, and
    the terms of ``config.objective`` that are not 0. In a phase with the objective "forward" the forward model's loss stands in for L_fm and
    all that belongs to the generator.
    """

    def __init__(
        self,
        config: RunConfig,
        bf16: bool,
        autoencoder: Autoencoder,
        lam: LatentActionModel,
        conditioning: ActionConditioning,
        world: WorldModel,
    ) -> None:
        super().__init__(bf16, autoencoder)
        self.config = config
        self.lam = lam
        self.conditioning = conditioning
        self.world = world
        self._asks_generator = True
        self._lam_trains = True

    def roles(self) -> tuple[str, ...]:
        return ("lam", "conditioning", "world")

    def set_phase(self, phase: Phase) -> None:
        super().set_phase(phase)
        self._asks_generator = phase.objective == "flow"
        self._lam_trains = "lam" in phase.trains

    def forward(self, clips: Clips, step: int) -> StepOutput:
        """Loss and codes of a batch, by the formula above; all draws are keyed by the clips' positions."""
        with self._autocast(clips.video.device):
            pixels = to_pixels(clips.video)
            # A LAM that is frozen stays as it is: no gradient, and no code is placed anew.
            with torch.set_grad_enabled(self._lam_trains and torch.is_grad_enabled()):
                _, quantised = self.lam.infer(pixels, step, self._noise(clips)) if self._lam_trains else self.lam.infer(pixels)
            terms = self._flow_terms(clips, self._taught(quantised)) if self._asks_generator else {}
            if self.lam.forward_model is not None and self._lam_trains:
                predicted = self.lam.forward_model(pixels, quantised.actions)
                error = functional.mse_loss(predicted.float(), pixels[:, 1:])
                terms["forward_loss"] = (self.config.objective.forward_weight, error)
        return self._output(terms, quantised, quantised.codes)

    def _output(self, terms: Mapping[str, tuple[float, Tensor]], quantised: Quantised, codes: Tensor) -> StepOutput:
        """The weighted sum of ``terms`` and, where the LAM trains, of the bottleneck's."""
        losses = [weight * value for weight, value in terms.values()]
        metrics = {name: value.detach() for name, (_, value) in terms.items()}
        if self._lam_trains:
            losses.append(quantised.loss)
            metrics |= self.lam.bottleneck.metrics(quantised)
        loss = torch.stack(losses).sum()
        return StepOutput(loss, {"loss": loss.detach()} | metrics, codes)

    def _taught(self, quantised: Quantised) -> Tensor:
        """Latent actions as the generator is given them: with a gradient to the LAM, or without."""
        return quantised.actions if self.config.objective.generator_teaches_lam else quantised.actions.detach()

    def _noise(self, clips: Clips) -> Tensor | None:
        """What latent actions are sampled with, where the bottleneck samples them."""
        if not self.lam.bottleneck.samples:
            return None
        shape = (clips.video.shape[1] - 1, self.config.lam.tokens, self.config.lam.bottleneck.dim)
        return Draws(self.config.train.seed, clips.position, clips.video.device).normal("latent", *shape)

    def _flow_terms(self, clips: Clips, actions: Tensor) -> dict[str, tuple[float, Tensor]]:
        """Weight and value of each term that asks the generator, given latent actions ``[B, T-1, N, D]``."""
        objective, flow = self.config.objective, self.config.flow
        draws = Draws(self.config.train.seed, clips.position, clips.video.device)
        x0 = self.latents(clips)
        dropped = draws.dropped(self.config.conditioning.dropout, actions.shape[1])
        eps = draws.normal("noise", *x0.shape[1:])
        tau, generated = frame_times(draws.flow_time(flow), draws.context(flow, x0.shape[1]), x0.shape[1])
        x_tau = noised(x0, eps, tau)
        weight = motion_weights(x0, objective.motion_weight) if objective.motion_weight else None
        own = flow_loss(self.world(x_tau, tau, self.conditioning(actions, dropped)), x0, eps, generated, weight)
        terms = {"flow_loss": (1.0, own.mean())}
        if objective.ranking_weight and len(clips) > 1:
            modulation = self.conditioning(actions[other_clip(clips.source)], dropped)
            other = flow_loss(self.world(x_tau, tau, modulation), x0, eps, generated, weight)
            terms["ranking_loss"] = (objective.ranking_weight, ranking_loss(own, other, objective.ranking_margin))
        return terms

    def latent_actions(self, clips: Clips) -> tuple[Tensor, Quantised]:
        """What stands for the clips' actions in every look at held-out clips: z ``[B, T-1, N, D]``, and what the generator is given of it."""
        return self.lam.infer(to_pixels(clips.video))

    @torch.no_grad()
    def evaluate(self, clips: Clips) -> dict[str, Tensor]:
        """Sums over clips, float64, for `cola_dist.diagnostics` (M transitions of N tokens of D dimensions, K codes).

        ``code_counts [N, K]`` (if there are codes), ``joint_counts [K**N]`` (if at most 65,536), ``z_count []``, ``z_sum [D]``, ``z_outer [D, D]``
        over tokens; ``flow_count``, ``flow_own``, ``flow_shuffled``, ``flow_null`` per bin of tau ``[4]``: flow loss after one context frame
        with the clip's own actions, with another clip's (`other_clip`) and with the null action, at the same noise and tau; ``flow_copy`` is the
        same loss of a predictor that repeats the context frame. Each clip is
        measured in two of the four bins, even or odd ones by its position: that halves the cost of all four and keeps each comparison
        paired. A batch of one clip has no other clip and adds nothing to the flow sums. ``modulation_action`` and ``modulation_base`` per block:
        squared modulation that the clip's actions make (own less null) and that flow time and null action make. ``forward_error`` and
        ``forward_count`` where there is a forward model.
        """
        device = clips.video.device
        with self._autocast(device):
            pixels = to_pixels(clips.video)
            z, quantised = self.latent_actions(clips)
            sums = self._code_sums(z, quantised)
            sums |= self._flow_sums(clips, quantised.actions)
            if self.lam.forward_model is not None:
                error = (self.lam.forward_model(pixels, quantised.actions).float() - pixels[:, 1:]).square().mean((1, 2, 3, 4))
                sums |= {
                    "forward_error": error.double().sum(),
                    "forward_count": torch.tensor(len(clips), dtype=torch.float64, device=device),
                }
        return sums

    @torch.no_grad()
    def latent_rows(self, clips: Clips) -> Tensor:
        """z, a row per latent transition: fp32 ``[B*(L-1), r*N*D]``."""
        with self._autocast(clips.video.device):
            z = self.lam.idm(to_pixels(clips.video))
        rows: Tensor = z.float().reshape(z.shape[0] * z.shape[1] // self.autoencoder.shape.stride, -1)
        return rows

    @torch.no_grad()
    def feature_changes(self, clips: Clips) -> Tensor:
        """By how much the generator's features, made without any action, change in each latent transition: fp32 ``[B*(L-1), F]``."""
        with self._autocast(clips.video.device):
            features = self.world.features(self.latents(clips))
        change: Tensor = (features[:, 1:] - features[:, :-1]).flatten(0, 1)
        return change

    def gradients(self, clips: Clips) -> dict[str, list[Tensor]]:
        """Gradients of a batch by what they come from and whom they reach; only of roles that train.

        ``flow/lam`` and ``bottleneck/lam``: of the inverse dynamics' weights, from the flow loss and from the bottleneck's terms.
        ``flow/conditioning`` and ``flow/world``: of all weights of those roles, from the flow loss. No weight's ``grad`` is touched.
        """
        with self._autocast(clips.video.device), torch.enable_grad():
            _, quantised = self.lam.infer(to_pixels(clips.video))
            terms = self._flow_terms(clips, self._taught(quantised))
        _, flow = terms["flow_loss"]
        reached = {
            "flow/lam": (flow, self.lam.idm.parameters()),
            "bottleneck/lam": (quantised.loss, self.lam.idm.parameters()),
            "flow/conditioning": (flow, self.conditioning.parameters()),
            "flow/world": (flow, self.world.parameters()),
        }
        return gradients_of(reached)

    def _code_sums(self, z: Tensor, quantised: Quantised) -> dict[str, Tensor]:
        rows = z.flatten(0, 2).double()
        sums = {
            "z_count": torch.tensor(len(rows), dtype=torch.float64, device=z.device),
            "z_sum": rows.sum(0),
            "z_outer": rows.T @ rows,
        }
        codes = quantised.codes.flatten(0, 1)
        k, n = self.lam.bottleneck.codes, codes.shape[1]
        if k > 0:
            sums["code_counts"] = torch.stack([torch.bincount(codes[:, slot], minlength=k) for slot in range(n)]).double()
            if k**n <= MAX_JOINT_CODES:
                joint = (codes * k ** torch.arange(n, device=codes.device)).sum(1)
                sums["joint_counts"] = torch.bincount(joint, minlength=k**n).double()
        return sums

    @torch.no_grad()
    def clip_losses(self, clips: Clips) -> Tensor:
        """Flow loss of each clip with its own, another clip's and the null actions and of a repeated context frame, ``[B, 4]`` fp32, mean over
        the two bins of tau that it is measured in. Needs at least two clips."""
        with self._autocast(clips.video.device):
            _, quantised = self.latent_actions(clips)
            halves = [torch.stack(list(losses.values()), 1) for _, losses, _ in self._paired_losses(clips, quantised.actions)]
        return torch.stack(halves).mean(0)

    def _flow_sums(self, clips: Clips, own: Tensor) -> dict[str, Tensor]:
        device = clips.video.device
        names = ("flow_count", "flow_own", "flow_shuffled", "flow_null", "flow_copy")
        sums = {name: torch.zeros(TAU_BINS, dtype=torch.float64, device=device) for name in names}
        blocks = self.world.modulation_shape[0]
        sums |= {name: torch.zeros(blocks, dtype=torch.float64, device=device) for name in ("modulation_action", "modulation_base")}
        if len(clips) < 2:
            return sums
        for bins, losses, squares in self._paired_losses(clips, own):
            sums["flow_count"].index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
            for name, loss in losses.items():
                sums[name].index_add_(0, bins, loss.double())
            for name, square in squares.items():
                sums[name] += square / 2
        return sums

    def _paired_losses(self, clips: Clips, own: Tensor) -> Iterator[tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]]:
        """For each of the two bins ``[B]`` of tau in which a clip is measured: flow losses ``[B]`` by whose actions are given, and the squared
        modulation per block that the clip's actions and all else make."""
        x0 = self.latents(clips)
        eps = Draws(self.config.train.seed, clips.position, clips.video.device).normal("noise", *x0.shape[1:])
        modulations = {
            "flow_own": self.conditioning(own),
            "flow_shuffled": self.conditioning(own[other_clip(clips.source)]),
            "flow_null": self.conditioning(self.conditioning.null_actions(*own.shape[:2])),
        }
        action = _square_by_block(modulations["flow_own"] - modulations["flow_null"])
        for half in range(2):
            bins = clips.position.to(x0.device) % 2 + 2 * half
            tau, generated = frame_times(bin_times(self.config.flow.tau_min, bins), torch.ones_like(bins), x0.shape[1])
            x_tau = noised(x0, eps, tau)
            losses = {name: flow_loss(self.world(x_tau, tau, one), x0, eps, generated) for name, one in modulations.items()}
            losses["flow_copy"] = flow_loss(still_velocity(x_tau, x0, tau), x0, eps, generated)
            base = _square_by_block(self.world.base_modulation(tau) + modulations["flow_null"])
            yield bins, losses, {"modulation_action": action, "modulation_base": base}


def gradients_of(reached: Mapping[str, tuple[Tensor, Iterable[nn.Parameter]]]) -> dict[str, list[Tensor]]:
    """The gradient of each loss with respect to those of its parameters that train, where there are any. No weight's ``grad`` is touched."""
    trained = {name: [p for p in parameters if p.requires_grad] for name, (loss, parameters) in reached.items() if loss.requires_grad}
    found: dict[str, list[Tensor]] = {}
    # One pass for all that a loss reaches: what a checkpoint keeps besides its input serves one pass, and passes are dear.
    for loss in {id(loss): loss for loss, _ in reached.values()}.values():
        wanted = {name: trained[name] for name, (own, _) in reached.items() if own is loss and trained.get(name)}
        if wanted:
            got = iter(torch.autograd.grad(loss, [p for own in wanted.values() for p in own], retain_graph=True, allow_unused=True))
            found |= {name: [torch.zeros_like(p) if (g := next(got)) is None else g for p in own] for name, own in wanted.items()}
    return found


def _square_by_block(modulation: Tensor) -> Tensor:
    """Mean square of ``modulation [B, L, blocks, ...]`` by block, added up over clips, fp64."""
    squares: Tensor = modulation.double().square().flatten(3).mean((1, 3)).sum(0)
    return squares
