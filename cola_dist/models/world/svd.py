"""Stable Video Diffusion's UNet as a world model, from diffusers' parts: its noise schedule behind this project's velocity, actions per frame."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cola_dist.models.layers import pooled_places
from cola_dist.models.world.base import WorldModel

_MULTIPLES = (1, 2, 4, 4)
_HALVINGS = 8
"""By how much the innermost places are coarser than the latents."""
_IMAGE_FEATURES = 1024
_SIGMA_MIN, _SIGMA_MAX = 0.002, 700.0
_MOTION, _AUGMENTATION = 127.0, 0.02
"""What the published pipeline tells the model of motion and of noise on the image, unless asked otherwise."""
_LATENT_SCALE = 0.18215
"""The image beside the noise is given as the autoencoder leaves it, not scaled as the latents are."""


class SvdUNet(WorldModel):
    """A UNet with temporal layers (Blattmann et al., 2311.15127; what AdaWorld adapts), whose time embedding takes actions, one row per frame.

    EDM's noisy latents x0 + sigma eps are x_tau / (1 - tau) at sigma = tau / (1 - tau). The network gives EDM's v, from which clean latents and
    then the velocity follow: v = (x_tau - x0) / tau. The first frame, which is clean, is also the image beside every frame, as in pretraining; the
    features of an image encoder that pretraining had besides are zeros, as where its guidance drops them.
    """

    kind = "svd"
    shape_names = ("channels", "patch", "width", "depth", "heads", "fps")
    published_class, published_model = "UNetSpatioTemporalConditionModel", "Stable Video Diffusion"
    published_fixed: ClassVar[Mapping[str, Any]] = {
        "cross_attention_dim": _IMAGE_FEATURES,
        "transformer_layers_per_block": 1,
        "addition_time_embed_dim": 256,
    }

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, fps: int) -> None:
        """``width``, ``heads``: of the outermost level (published: 320, 5). ``depth``: layers per level (2). ``patch``: 8, the coarsest places."""
        from diffusers import UNetSpatioTemporalConditionModel

        super().__init__()
        if patch != _HALVINGS:
            raise ValueError(f"patch is {patch}, this network's coarsest places are of {_HALVINGS} x {_HALVINGS}")
        self.channels, self.patch, self.width, self.depth, self.heads, self.fps = channels, patch, width, depth, heads, fps
        whole = UNetSpatioTemporalConditionModel(
            in_channels=2 * channels,
            out_channels=channels,
            block_out_channels=tuple(width * multiple for multiple in _MULTIPLES),
            num_attention_heads=tuple(heads * multiple for multiple in _MULTIPLES),
            layers_per_block=depth,
            cross_attention_dim=_IMAGE_FEATURES,
        )
        # Its parts under their own names, as the published files have them; its forward has one flow time per clip and no place for actions.
        self.conv_in, self.time_proj, self.time_embedding = whole.conv_in, whole.time_proj, whole.time_embedding
        self.add_time_proj, self.add_embedding = whole.add_time_proj, whole.add_embedding
        self.down_blocks, self.mid_block, self.up_blocks = whole.down_blocks, whole.mid_block, whole.up_blocks
        self.conv_norm_out, self.conv_act, self.conv_out = whole.conv_norm_out, whole.conv_act, whole.conv_out

    @classmethod
    def published_sizes(cls, config: Mapping[str, Any]) -> dict[str, int]:
        sizes = {"width": config["block_out_channels"], "heads": config["num_attention_heads"]}
        for name, levels in sizes.items():
            if list(levels) != [levels[0] * multiple for multiple in _MULTIPLES]:
                raise ValueError(f"{name} of the levels are {levels}, not as 1 : 2 : 4 : 4")
        channels = config["out_channels"]
        if config["in_channels"] != 2 * channels or not isinstance(config["layers_per_block"], int):
            raise ValueError(f"in_channels is {config['in_channels']}, with the image beside the noise it has {2 * channels}")
        return {"channels": channels, "patch": _HALVINGS, "depth": config["layers_per_block"]} | {name: s[0] for name, s in sizes.items()}

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """One row, added to the embedding of time that every block takes."""
        return (1, 1, 4 * self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return [*self.down_blocks, self.mid_block, *self.up_blocks]

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, 1, 1, 4*width]`` or none."""
        tau = tau.float().clamp(_SIGMA_MIN / (1 + _SIGMA_MIN), _SIGMA_MAX / (1 + _SIGMA_MAX))[:, :, None, None, None]
        sigma = tau / (1 - tau)
        noisy, spread = x_tau.float() * (1 + sigma), (1 + sigma.square()).sqrt()
        levels, hidden, embedded, context = self._inner(noisy / spread, x_tau, sigma, modulation)
        for block in self.up_blocks:
            count = len(block.resnets)
            hidden = self._pass(block, hidden, embedded, context, x_tau.shape[:2], res_hidden_states_tuple=tuple(levels[-count:]))
            levels = levels[:-count]
        out = self.conv_out(self.conv_act(self.conv_norm_out(hidden))).float().unflatten(0, x_tau.shape[:2])
        clean: Tensor = noisy / spread.square() - out * sigma / spread
        return (x_tau.float() - clean) / tau

    def base_modulation(self, tau: Tensor) -> Tensor:
        tau = tau.float().clamp(_SIGMA_MIN / (1 + _SIGMA_MIN), _SIGMA_MAX / (1 + _SIGMA_MAX))
        rows: Tensor = self._time(tau / (1 - tau))[:, :, None, None]
        return rows

    def features(self, x0: Tensor) -> Tensor:
        """The innermost block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        sigma = torch.full((*x0.shape[:2], 1, 1, 1), _SIGMA_MIN, device=x0.device)
        _, hidden, _, _ = self._inner(x0, x0, sigma, None)
        return pooled_places(hidden.unflatten(0, x0.shape[:2]).flatten(3).transpose(2, 3), *hidden.shape[-2:])

    def _time(self, sigma: Tensor) -> Tensor:
        """Embedding of noise, frame rate, motion and augmentation, ``[B, L, 4*width]`` for ``sigma [B, L]``."""
        noise = self.time_embedding(self.time_proj(0.25 * sigma.log().flatten()))
        told = torch.tensor([self.fps - 1.0, _MOTION, _AUGMENTATION], device=sigma.device)
        time: Tensor = (noise + self.add_embedding(self.add_time_proj(told).reshape(1, -1))).unflatten(0, sigma.shape)
        return time

    def _inner(self, scaled: Tensor, x: Tensor, sigma: Tensor, modulation: Tensor | None) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
        """Through all blocks down and the middle one: what each layer gives to its counterpart on the way up, the innermost ``[B*L, C', h/8, w/8]``,
        the embedding ``[B*L, 4*width]`` and the image's features."""
        time = self._time(sigma[:, :, 0, 0, 0])
        if modulation is not None:
            time = time + modulation[:, :, 0, 0]
        embedded = time.flatten(0, 1)
        context = torch.zeros(len(embedded), 1, _IMAGE_FEATURES, device=x.device)
        image = (x[:, :1] / _LATENT_SCALE).expand_as(x).to(scaled.dtype)
        hidden = self.conv_in(torch.cat([scaled, image], 2).flatten(0, 1))
        levels = [hidden]
        for block in self.down_blocks:
            hidden, passed = self._pass(block, hidden, embedded, context, x.shape[:2])
            levels += passed
        return levels, self._pass(self.mid_block, hidden, embedded, context, x.shape[:2]), embedded, context

    def _pass(self, block: Any, hidden: Tensor, embedded: Tensor, context: Tensor, frames: Sequence[int], **more: Any) -> Any:
        """A block's output, told of time, frames and, where it takes it, the image."""
        more["image_only_indicator"] = torch.zeros(*frames, device=hidden.device)
        if getattr(block, "has_cross_attention", False):
            more["encoder_hidden_states"] = context
        return block(hidden, temb=embedded, **more)
