"""From a robot's real actions to latent actions."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Self

import torch
from torch import Tensor, nn

from cola_dist.errors import UserError
from cola_dist.models.bottleneck import Bottleneck
from cola_dist.models.published import HERE, load_published, read_config, without_weights

FORMAT_VERSION = 1
_SHAPE = ("kind", "action_dim", "state_dim", "tokens", "dim", "width")
_KINDS = ("mlp", "linear")
_INSIDE = ("adapter", "export/adapter")


class ActionAdapter(nn.Module):
    """Role "adapter": each action on its own, with the state that it starts from where it was made for one, to N tokens of D dimensions.

    Actions and states come in the robot's own units; the buffers hold their mean and standard deviation over the training split, and those of the
    LAM's codes, in whose units the layers work: codes may lie far apart.
    """

    action_mean: Tensor
    action_std: Tensor
    state_mean: Tensor
    state_std: Tensor
    token_mean: Tensor
    token_std: Tensor

    def __init__(self, kind: str, action_dim: int, state_dim: int, tokens: int, dim: int, width: int) -> None:
        """``kind`` is "linear" or "mlp", of two layers with ``width`` units between them; ``state_dim`` 0 = no state."""
        super().__init__()
        self.kind, self.action_dim, self.state_dim, self.tokens, self.dim, self.width = kind, action_dim, state_dim, tokens, dim, width
        given, made = action_dim + state_dim, tokens * dim
        self.net = nn.Linear(given, made) if kind == "linear" else nn.Sequential(nn.Linear(given, width), nn.SiLU(), nn.Linear(width, made))
        for name, size in (("action", action_dim), ("state", state_dim), ("token", dim)):
            self.register_buffer(f"{name}_mean", torch.zeros(size))
            self.register_buffer(f"{name}_std", torch.ones(size))
        self.snaps_to: Bottleneck | None = None
        """What rounds the tokens, where an adapter is used alone and the generator was trained on codes; training rounds them itself."""

    def forward(self, actions: Tensor, state: Tensor | None = None) -> Tensor:
        """Actions ``[B, T-1, A]`` and states before them ``[B, T-1, S]``, not normalised, to latent actions fp32 ``[B, T-1, N, D]``.

        Raises ``ValueError`` for another A or S.
        """
        if actions.shape[-1] != self.action_dim or (0 if state is None else state.shape[-1]) != self.state_dim:
            had = f"{tuple(actions.shape)} and {None if state is None else tuple(state.shape)}"
            raise ValueError(f"this adapter takes actions of {self.action_dim} numbers and states of {self.state_dim}, it was given {had}")
        given = (actions.float() - self.action_mean) / self.action_std
        if state is not None:
            given = torch.cat([given, (state.float() - self.state_mean) / self.state_std], -1)
        tokens: Tensor = self.token_mean + self.token_std * self.net(given).float().unflatten(-1, (self.tokens, self.dim))
        return tokens if self.snaps_to is None else self.snaps_to(tokens).actions

    @torch.no_grad()
    def scale_to(self, bottleneck: Bottleneck) -> None:
        """Take over mean and deviation of the codes of ``bottleneck``; nothing where it has none, for such latents are near N(0, 1)."""
        if bottleneck.codes:
            places = bottleneck.actions_of(torch.arange(bottleneck.codes))
            self.token_mean.copy_(places.mean(0))
            self.token_std.copy_(places.std(0).clamp(min=1e-6))

    def save(self, uri: str) -> str:
        """Write ``config.json`` (shape, scale, sha256) and ``model.safetensors`` into the folder ``uri``; return the sha256 of the weights."""
        from safetensors.torch import save

        from cola_dist import storage

        own = ((name, tensor) for name, tensor in self.state_dict().items() if not name.startswith("snaps_to."))
        weights = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in own})
        content_hash = hashlib.sha256(weights).hexdigest()
        scale = {name: tensor.tolist() for name, tensor in self.named_buffers(recurse=False)}
        config = {"format": FORMAT_VERSION} | {name: getattr(self, name) for name in _SHAPE} | scale | {"sha256": content_hash}
        storage.write_bytes(storage.join(uri, "model.safetensors"), weights)
        storage.write_bytes(storage.join(uri, "config.json"), json.dumps(config, indent=2).encode() + b"\n")
        return content_hash

    @classmethod
    def load(cls, uri: str) -> Self:
        """The adapter that ``save`` wrote into the folder ``uri``, on the CPU. Raises `UserError`."""
        config: dict[str, Any] = read_config(uri, "adapter", _INSIDE)
        if config.get("format") != FORMAT_VERSION or not {*_SHAPE, "sha256"} <= config.keys():
            raise UserError(f"{uri}/config.json is not an adapter's of format {FORMAT_VERSION}: adapt again with this version")
        sizes = {name: config[name] for name in _SHAPE}
        if sizes["kind"] not in _KINDS or any(type(size) is not int or size < 0 for name, size in sizes.items() if name != "kind"):
            raise UserError(f"{uri}/config.json does not say how large the adapter is: adapt again with this version")
        adapter: Self = without_weights(lambda: cls(**sizes))
        load_published(adapter, uri, "(?!)", HERE, config["sha256"])
        return adapter
