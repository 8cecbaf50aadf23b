"""Wan 2.1's text-to-video transformer as a world model, from diffusers' parts: modulated per frame, with the prompt always empty or gone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from cola_dist.models.layers import Nothing, pooled_places, unpatchify_channels_last
from cola_dist.models.published import MOST_TOKENS, Loaded
from cola_dist.models.world.base import WorldModel


class WanVideo(WorldModel):
    """Blocks of attention over all places of all frames, cross-attention to the prompt, MLP (Wan Team, 2503.20314).

    Attention goes both ways in time, as in pretraining. As in STDiT3 one row set of shift, scale and gate from the flow time is shared by all blocks;
    here it is one per frame, by the path that diffusers has for one flow time per token.

    The prompt is always empty. Of its embedding by the text encoder `take_prompt` is given the rows, which are kept with the weights. Without, it is
    one token of zeros, which stands for any number of them, since equal keys share their weight: Wan pads prompts with zeros, so that is what it saw
    of an empty prompt but for one end token. With ``text_width`` 0 cross-attention and the text's embedder are gone.
    """

    kind = "wan"
    shape_names = ("channels", "patch", "width", "depth", "heads", "mlp_width", "text_width")
    shape_more = ("prompt_tokens",)
    published_class, published_model = "WanTransformer3DModel", "Wan 2.1, text to video"
    published_fixed: ClassVar[Mapping[str, Any]] = {
        **{"patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "cross_attn_norm": True, "freq_dim": 256},
        **{"image_dim": None, "added_kv_proj_dim": None},
    }

    def __init__(
        self, channels: int, patch: int, width: int, depth: int, heads: int, mlp_width: int, text_width: int, prompt_tokens: int = 0
    ) -> None:
        """``prompt_tokens``: rows of the null prompt that the weights hold."""
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
                block.attn2, block.norm2 = Nothing(), nn.Identity()
        self.prompt_tokens = 0
        if prompt_tokens:
            self._keep_prompt(torch.zeros(min(prompt_tokens, MOST_TOKENS), text_width))

    null_prompt: Tensor

    def take_prompt(self, rows: Tensor, loaded: Loaded) -> None:
        """Give ``rows [n, text_width]`` for the prompt from here on, which ``loaded`` tells the file of."""
        self._keep_prompt(rows)
        self.prompt = loaded
        if self.content_hash is not None:
            self.content_hash = hashlib.sha256(f"{self.content_hash}\n{loaded.sha256}\n".encode()).hexdigest()

    def _keep_prompt(self, rows: Tensor) -> None:
        self.prompt_tokens = len(rows)
        self.register_buffer("null_prompt", rows)

    @property
    def published_drops(self) -> str:  # type: ignore[override]
        return "(?!)" if self.text_width else r"(?:.*\.)?(attn2|norm2|text_embedder)\."

    @classmethod
    def published_sizes(cls, config: Mapping[str, Any]) -> dict[str, int]:
        heads = config["num_attention_heads"]
        sizes = {"width": heads * config["attention_head_dim"], "depth": config["num_layers"], "mlp_width": config["ffn_dim"]}
        return {"channels": config["in_channels"], "patch": 2, "heads": heads} | sizes

    @property
    def modulation_shape(self) -> tuple[int, ...]:
        """One set of six rows that all blocks share: shift, scale, gate of attention and of MLP."""
        return (1, 6, self.width)

    def repeated_blocks(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """fp32 velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at ``tau [B, L]``; ``modulation [B, L, 1, 6, width]`` or none."""
        height, width = x_tau.shape[-2:]
        places = (height // self.patch) * (width // self.patch)
        hidden, time = self._hidden(x_tau, tau, modulation)
        shift, scale = (self.scale_shift_table + time.unsqueeze(2)).unsqueeze(2).unbind(3)
        out = self.proj_out(self.norm_out(hidden.unflatten(1, (-1, places)).float()) * (1 + scale) + shift)
        return unpatchify_channels_last(out, self.patch, height, width).float()

    def base_modulation(self, tau: Tensor) -> Tensor:
        _, rows, _ = self._conditions(tau)
        return rows.unsqueeze(2)

    def features(self, x0: Tensor) -> Tensor:
        """The last block's output, its places pooled to a grid of at most 4 x 4, ``[B, L, F]``."""
        rows, columns = x0.shape[-2] // self.patch, x0.shape[-1] // self.patch
        hidden, _ = self._hidden(x0, torch.zeros(x0.shape[:2], device=x0.device), None)
        return pooled_places(hidden.unflatten(1, (-1, rows * columns)), rows, columns)

    def _conditions(self, tau: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For ``tau [B, L]``: embedded time ``[B, L, width]``, its rows ``[B, L, 6, width]``, and the prompt ``[B, n, width]``."""
        prompt = self.null_prompt if self.prompt_tokens else torch.zeros(1, self.text_width or self.width, device=tau.device)
        prompt = prompt.expand(len(tau), -1, -1)
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
        for block in self.blocks:
            h = block(h, prompt, rows, angles)
        return h, time
