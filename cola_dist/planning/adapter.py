"""From real actions to the latent actions of an adapted model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cola_dist.errors import UserError
from cola_dist.methods.cotrain import CoTrain


class LinearAdapter(nn.Module):
    """One affine map per action."""

    def __init__(self, actions: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.tokens = tokens
        self.map = nn.Linear(actions, tokens * dim)

    def forward(self, actions: Tensor) -> Tensor:
        """Raw actions fp32 ``[B, T-1, A]`` to latent actions ``[B, T-1, N, D]``."""
        latent: Tensor = self.map(actions).unflatten(-1, (self.tokens, -1))
        return latent


def load_adapted(uri: str, device: torch.device) -> tuple[CoTrain, nn.Module]:
    """The models of an export and its adapter, ``adapter/model.safetensors``. Raises `UserError` where there is none."""
    from safetensors.torch import load

    from cola_dist import storage
    from cola_dist.evaluation.exported import export_folder, load_export

    where = storage.join(export_folder(uri), "adapter", "model.safetensors")
    if not storage.exists(where):
        raise UserError(f"{where} is missing: adapt the model to a domain's actions first")
    method = load_export(uri, device)
    weights = load(storage.read_bytes(where))
    adapter = LinearAdapter(weights["map.weight"].shape[1], method.config.lam.tokens, method.config.lam.bottleneck.dim)
    adapter.load_state_dict(weights)
    return method, adapter.to(device).eval()
