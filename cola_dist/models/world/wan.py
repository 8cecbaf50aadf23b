"""Wan 2.1's text-to-video transformer as a world model, from diffusers' parts: modulated per frame, with the prompt always empty or gone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cola_dist.errors import UserError
from cola_dist.models.layers import pooled_places
from cola_dist.models.world.base import WorldModel

_FIXED = {"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "freq_dim": 256}
_FIXED |= {"image_dim": None, "added_kv_proj_dim": None}


class WanVideo(WorldModel):
    """Blocks of attention over all places of all frames, cross-attention to the prompt, MLP (Wan Team, 2503.20314).

    Attention goes both ways in time, as in pretraining. As in STDiT3 one row set of shift, scale and gate from the flow time is shared by all blocks;
    here it is one per frame, by the path that diffusers has for one flow time per token.

    The prompt is one token of zeros, which stands for any number of them, since equal keys share their weight: Wan pads prompts with zeros, so
    that is what it saw of an empty prompt but for one end token. With ``text_width`` 0 cross-attention and the text's embedder are gone.
    """

    kind = "wan"
    shape_names = ("channels", "patch", "width", "depth", "heads", "mlp_width", "text_width")
    published_class = "WanTransformer3DModel"

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, mlp_width: int, text_width: int) -> None:
        from diffusers import WanTransformer3DModel

        super().__init__()
        self.channels, self.patch, self.width, self.depth, self.heads = channels, patch, width, depth, heads
        self.mlp_width, self.text_width = mlp_width, text_width
        whole = WanTransformer3DModel(
            patch_size=(1, patch, patch),
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_width or 1,
            ffn_dim=mlp_width,
            num_layers=depth,
        )
        # Its parts under their own names, as the published files have them; its forward has no place for actions.
        self.rope, self.patch_embedding, self.condition_embedder = whole.rope, whole.patch_embedding, whole.condition_embedder
        self.blocks, self.norm_out, self.proj_out = whole.blocks, whole.norm_out, whole.proj_out
        self.scale_shift_table = whole.scale_shift_table
        if not text_width:
            self.condition_embedder.text_embedder = nn.Identity()
            for block in self.blocks:
                block.attn2, block.norm2 = _NoPrompt(), nn.Identity()
        self._checkpointing = False

    @property
    def published_drops(self) -> str:  # type: ignore[override]
        return "(?!)" if self.text_width else r"(?:.*\.)?(attn2|norm2|text_embedder)\."

    @classmethod
    def published_shape(cls, config: Mapping[str, Any], where: str) -> dict[str, int]:
        for name, value in _FIXED.items():
            if config.get(name, value) != value:
                raise UserError(f"{where}: {name} is {config[name]}, this model has {value}: choose a text-to-video checkpoint of Wan 2.1")
        try:
            heads, channels = config["num_attention_heads"], config["in_channels"]
            sizes = {"width": heads * config["attention_head_dim"], "depth": config["num_layers"], "mlp_width": config["ffn_dim"]}
        except KeyError as error:
            raise UserError(
                f"{where} is not the config.json of a Wan transformer (it lacks {error}): copy it again from its origin"
            ) from None
        return {"channels": channels, "patch": 2, "heads": heads} | sizes

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """One set of six rows that all blocks share: shift, scale, gate of attention and of MLP."""
        return (1, 6, self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def enable_checkpointing(self) -> None:
        self._checkpointing = True

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, 1, 6, width]`` or none."""
        height, width = x_tau.shape[-2:]
        rows, columns = height // self.patch, width // self.patch
        hidden, time = self._hidden(x_tau, tau, modulation)
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        out = self.proj_out(self.norm_out(hidden.unflatten(1, (-1, rows * columns)).float()) * (1 + scale) + shift)
        cut = out.unflatten(2, (rows, columns)).unflatten(-1, (self.patch, self.patch, self.channels))
        velocity: Tensor = cut.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4).float()
        return velocity

    def base_modulation(self, tau: Tensor) -> Tensor:
        _, rows, _ = self._conditions(tau)
        return rows.unsqueeze(2)

    def features(self, x0: Tensor) -> Tensor:
        """The last block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        rows, columns = x0.shape[-2] // self.patch, x0.shape[-1] // self.patch
        hidden, _ = self._hidden(x0, torch.zeros(x0.shape[:2], device=x0.device), None)
        return pooled_places(hidden.unflatten(1, (-1, rows * columns)), rows, columns)

    def _conditions(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For ``tau [B, L]``: embedded time ``[B, L, width]``, its rows ``[B, L, 6, width]``, and the prompt ``[B, 1, width]``."""
        prompt = torch.zeros(len(tau), 1, self.text_width or self.width, device=tau.device)
        time, rows, prompt, _ = self.condition_embedder((1000.0 * tau).flatten(), prompt, None, timestep_seq_len=tau.shape[1])
        return time, rows.unflatten(2, (6, -1)), prompt

    def _hidden(self, x: Tensor, tau: Tensor, modulation: Tensor | None) -> tuple[Tensor, Tensor]:
        """``x [B, L, C, h, w]`` through all blocks, ``[B, L*n, width]``, and the embedded time ``[B, L, width]``."""
        time, rows, prompt = self._conditions(tau)
        if modulation is not None:
            rows = rows + modulation[:, :, 0]
        places = (x.shape[-2] // self.patch) * (x.shape[-1] // self.patch)
        rows = rows.repeat_interleave(places, 1)
        x = x.transpose(1, 2)
        angles = self.rope(x)
        h = self.patch_embedding(x).flatten(2).transpose(1, 2).contiguous()
        checkpointing = self._checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            h = checkpoint(block, h, prompt, rows, angles, use_reentrant=False) if checkpointing else block(h, prompt, rows, angles)
        return h, time


class _NoPrompt(nn.Module):
    """In the place of a cross-attention that is gone."""

    def forward(self, hidden_states: Tensor, *_: Any) -> Tensor:
        return torch.zeros_like(hidden_states)
