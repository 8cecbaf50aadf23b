"""Adaptation of a co-trained world model to a robot's real actions (CoLA-World, arXiv 2510.26433: a 2-layer MLP, 3,000 steps)."""

from __future__ import annotations

import torch
from torch import Tensor

from cola_dist.config import RunConfig
from cola_dist.methods.base import Clips, StepOutput
from cola_dist.methods.cotrain import CoTrain, gradients_of
from cola_dist.models.adapter import ActionAdapter
from cola_dist.models.autoencoder import Autoencoder, to_pixels
from cola_dist.models.bottleneck import Quantised
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.lam import LatentActionModel
from cola_dist.models.world import WorldModel


class Adapt(CoTrain):
    """Roles "adapter", "conditioning" and "world", and "lam", which stays as it is unless it is given a learning rate; one loss.

    ``L = L_fm(adapter's actions) + match_weight * ||(adapter(actions) - sg[LAM(clip)]) / s||^2``, s being the deviation of the LAM's codes, with the
    draws and the optional terms of co-training.
    Where the LAM trains, the co-training loss with its own actions is added, so that it stays a model of the same actions.
    """

    def __init__(
        self,
        config: RunConfig,
        bf16: bool,
        autoencoder: Autoencoder,
        lam: LatentActionModel,
        conditioning: ActionConditioning,
        world: WorldModel,
        adapter: ActionAdapter,
    ) -> None:
        super().__init__(config, bf16, autoencoder, lam, conditioning, world)
        self.adapter = adapter

    def roles(self) -> tuple[str, ...]:
        return ("adapter", "lam", "conditioning", "world")

    def forward(self, clips: Clips, step: int) -> StepOutput:
        """Loss of a batch, by the formula above, and the LAM's codes next to the adapter's tokens."""
        weight = self.config.adapt.match_weight
        with self._autocast(clips.video.device):
            tokens, given = self.latent_actions(clips)
            terms = self._flow_terms(clips, given.actions)
            inferred = given
            if weight or self._lam_trains:
                with torch.set_grad_enabled(self._lam_trains and torch.is_grad_enabled()):
                    pixels = to_pixels(clips.video)
                    _, inferred = self.lam.infer(pixels, step, self._noise(clips)) if self._lam_trains else self.lam.infer(pixels)
                terms["match_loss"] = (weight, self._distance(tokens, inferred).mean())
            if self._lam_trains:
                terms["lam_flow_loss"] = self._flow_terms(clips, self._taught(inferred))["flow_loss"]
        return self._output(terms, inferred, given.codes)

    def latent_actions(self, clips: Clips) -> tuple[Tensor, Quantised]:
        """The adapter's tokens ``[B, T-1, N, D]`` of the real actions, the LAM's codes next to them, and the one or the other as actions."""
        assert clips.actions is not None, "the reader was asked for actions"
        tokens: Tensor = self.adapter(clips.actions, None if clips.state is None else clips.state[:, :-1])
        nearest: Quantised = self.lam.bottleneck(tokens)
        return tokens, nearest if self.config.adapt.quantise else nearest._replace(actions=tokens)

    def _distance(self, tokens: Tensor, inferred: Quantised) -> Tensor:
        """Squared, in the codes' own deviation, ``[B, T-1, N, D]``; 1 is what a guess of their mean comes to, where all are used alike."""
        return ((tokens - inferred.actions.detach()) / self.adapter.token_std).square()

    @torch.no_grad()
    def evaluate(self, clips: Clips) -> dict[str, Tensor]:
        """As in co-training with the real actions: codes are those next to the adapter's tokens, z the tokens themselves. ``match_error`` and
        ``match_count``: squared distance to the LAM's actions, summed over clips."""
        with self._autocast(clips.video.device):
            tokens, _ = self.latent_actions(clips)
            _, inferred = self.lam.infer(to_pixels(clips.video))
        error = self._distance(tokens, inferred).double().flatten(1).mean(1)
        return super().evaluate(clips) | {"match_error": error.sum(), "match_count": torch.ones_like(error).sum()}

    def gradients(self, clips: Clips) -> dict[str, list[Tensor]]:
        """Of the flow loss, with respect to all weights of the roles that train: ``flow/adapter``, ``flow/conditioning``, ``flow/world``."""
        with self._autocast(clips.video.device), torch.enable_grad():
            _, given = self.latent_actions(clips)
            _, flow = self._flow_terms(clips, given.actions)["flow_loss"]
        return gradients_of(
            {f"flow/{role}": (flow, self.get_submodule(role).parameters()) for role in ("adapter", "conditioning", "world")}
        )
