"""Cosmos-Predict2 2B (video to world) as a world model, from diffusers' parts: modulated per frame, without text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cola_dist.models.layers import Nothing, pooled_places, unpatchify_channels_last
from cola_dist.models.world.base import WorldModel

_ADALN, _TEXT = 256, 1024
_ROPE_SCALE = (1.0, 3.0, 3.0)
_CONTEXT_TIME = 1e-4 / (1 + 1e-4)
"""Flow time that the model was told of clean context frames: a noise of 1e-4."""


class CosmosVideo(WorldModel):
    """Blocks of attention over all places of all frames and an MLP (NVIDIA, Cosmos-Predict2; adapted to actions by DreamDojo, 2026).

    Its noise schedule sigma and this project's flow time are one: tau = sigma / (1 + sigma), and input and output scales of the published pipeline
    then make the network's output noise minus data. Context frames are marked by a channel, as in pretraining. One row set of shift, scale and gate
    from the flow time is shared by all sublayers, which add a low-rank map of the time of their own. An empty prompt is zeros in the published
    pipeline, and the cross-attention, which has no biases, gives nothing for it: so text layers are left out, and nothing changes.
    """

    kind = "cosmos"
    shape_names = ("channels", "patch", "width", "depth", "heads", "fps")
    published_class, published_model = "CosmosTransformer3DModel", "Cosmos-Predict2 2B, video to world"
    published_fixed: ClassVar[Mapping[str, Any]] = {
        **{"adaln_lora_dim": _ADALN, "mlp_ratio": 4.0, "text_embed_dim": _TEXT, "patch_size": [1, 2, 2], "rope_scale": list(_ROPE_SCALE)},
        **{"concat_padding_mask": True, "extra_pos_embed_type": None, "use_crossattn_projection": False, "img_context_dim_in": None},
    }
    published_drops = r"(?:.*\.)?(attn2|norm2)\."

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, fps: int) -> None:
        from diffusers import CosmosTransformer3DModel

        super().__init__()
        self.channels, self.patch, self.width, self.depth, self.heads, self.fps = channels, patch, width, depth, heads, fps
        whole = CosmosTransformer3DModel(
            in_channels=channels + 1,
            out_channels=channels,
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            num_layers=depth,
            text_embed_dim=_TEXT,
            adaln_lora_dim=_ADALN,
            patch_size=(1, patch, patch),
            rope_scale=_ROPE_SCALE,
            extra_pos_embed_type=None,
        )
        # Its parts under their own names, as the published files have them; its forward has no place for actions.
        self.patch_embed, self.rope, self.time_embed = whole.patch_embed, whole.rope, whole.time_embed
        self.transformer_blocks, self.norm_out, self.proj_out = whole.transformer_blocks, whole.norm_out, whole.proj_out
        for block in self.transformer_blocks:
            block.attn2, block.norm2 = Nothing(), _NoNorm()

    @classmethod
    def published_sizes(cls, config: Mapping[str, Any]) -> dict[str, int]:
        heads, channels = config["num_attention_heads"], config["out_channels"]
        if config["in_channels"] != channels + 1:
            raise ValueError(f"in_channels is {config['in_channels']}, with the channel that marks context it has {channels + 1}")
        return {
            "channels": channels,
            "patch": 2,
            "heads": heads,
            "width": heads * config["attention_head_dim"],
            "depth": config["num_layers"],
        }

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """One set of three rows that all sublayers share: shift, scale, gate."""
        return (1, 3, self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.transformer_blocks)

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, 1, 3, width]`` or none."""
        height, width = x_tau.shape[-2:]
        hidden, shared, time = self._hidden(x_tau, tau, modulation)
        out = self.proj_out(self.norm_out(hidden, time, shared)).unflatten(1, (x_tau.shape[1], -1))
        return unpatchify_channels_last(out, self.patch, height, width).float()

    def base_modulation(self, tau: Tensor) -> Tensor:
        shared, _ = self._conditions(tau)
        return shared.unsqueeze(2)

    def features(self, x0: Tensor) -> Tensor:
        """The last block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        rows, columns = x0.shape[-2] // self.patch, x0.shape[-1] // self.patch
        hidden, _, _ = self._hidden(x0, torch.zeros(x0.shape[:2], device=x0.device), None)
        return pooled_places(hidden.unflatten(1, (-1, rows * columns)), rows, columns)

    def _conditions(self, tau: Tensor) -> tuple[Tensor, Tensor]:
        """For ``tau [B, L]``: the rows that all sublayers share ``[B, L, 3, width]``, and the embedded time ``[B, L, width]``."""
        times = torch.where(tau == 0, _CONTEXT_TIME, tau.float())
        shared, time = self.time_embed(times, times.flatten())
        return shared.unflatten(0, tau.shape).unflatten(2, (3, -1)), time.unflatten(0, tau.shape)

    def _hidden(self, x: Tensor, tau: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """``x [B, L, C, h, w]`` through all blocks, ``[B, L*n, width]``; then shared rows ``[B, L*n, 3*width]`` and time ``[B, L*n, width]``."""
        shared, time = self._conditions(tau)
        if modulation is not None:
            shared = shared + modulation[:, :, 0]
        places = (x.shape[-2] // self.patch) * (x.shape[-1] // self.patch)
        shared, time = shared.flatten(2).repeat_interleave(places, 1), time.repeat_interleave(places, 1)
        x = x.transpose(1, 2)
        angles = self.rope(x, fps=self.fps)
        context = (tau == 0)[:, None, :, None, None].to(x.dtype).expand(-1, 1, -1, *x.shape[-2:])
        # Marks of context, and of what lies outside the picture: nothing.
        h = self.patch_embed(torch.cat([x, context, torch.zeros_like(context)], 1)).flatten(1, 3)
        for block in self.transformer_blocks:
            h = block(h, None, time, shared, angles)
        return h, shared, time


class _NoNorm(nn.Module):
    """In the place of the norm before a cross-attention that is gone: no change, and a gate that is shut."""

    def forward(self, hidden_states: Tensor, *_: Any) -> tuple[Tensor, float]:
        return hidden_states, 0.0
