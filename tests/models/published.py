"""Small models in the layouts that their authors publish, with random weights: text layers and all."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cola_dist.models.opensora_vae import OpenSoraVae
from cola_dist.models.world import STDiT3

STDIT = {"channels": 4, "patch": 2, "width": 24, "depth": 1, "heads": 2, "fps": 5}


def stdit3_tensors(seed: int = 0) -> dict[str, Tensor]:
    """All that a published file holds: also the text's embedder and each block's cross-attention."""
    torch.manual_seed(seed)
    model = STDiT3(**STDIT)
    tensors = {name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in model.state_dict().items() if name != "rope.freqs"}
    width = STDIT["width"]
    text = {"y_embedder.y_embedding": (6, 16), "y_embedder.y_proj.fc1.weight": (width, 16), "y_embedder.y_proj.fc2.weight": (width, width)}
    for kind in ("spatial", "temporal"):
        for layer, rows in (("q_linear", 1), ("kv_linear", 2), ("proj", 1)):
            text |= {
                f"{kind}_blocks.0.cross_attn.{layer}.weight": (rows * width, width),
                f"{kind}_blocks.0.cross_attn.{layer}.bias": (rows * width,),
            }
    return tensors | {"rope.freqs": model.rope.freqs} | {name: torch.randn(shape) for name, shape in text.items()}


def write_stdit3(folder: Path, tensors: dict[str, Tensor] | None = None, shards: int = 1, suffix: str = ".safetensors") -> Path:
    """A folder as Open-Sora's authors publish it; in ``shards`` files with an index where there are several."""
    tensors = stdit3_tensors() if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["STDiT3"], "model_type": "STDiT3", "in_channels": 4, "hidden_size": STDIT["width"], "depth": STDIT["depth"]}
    config |= {
        "num_heads": STDIT["heads"],
        "patch_size": [1, 2, 2],
        "qk_norm": True,
        "pred_sigma": True,
        "mlp_ratio": 4.0,
        "input_sq_size": 512,
    }
    (folder / "config.json").write_text(json.dumps(config))
    if suffix == ".pt":
        torch.save({"state_dict": tensors}, folder / "model.pt")
        return folder
    names = sorted(tensors)
    parts = {f"model-{i + 1:05d}-of-{shards:05d}{suffix}" if shards > 1 else f"model{suffix}": names[i::shards] for i in range(shards)}
    for file, keys in parts.items():
        save_file({key: tensors[key].contiguous() for key in keys}, folder / file)
    if shards > 1:
        index = {"weight_map": {key: file for file, keys in parts.items() for key in keys}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_opensora_vae(folder: Path, seed: int = 0) -> Path:
    """Open-Sora's autoencoder with four levels of 4 channels."""
    torch.manual_seed(seed)
    vae = OpenSoraVae((4, 4, 4, 4), 1, 4, 4, 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / "model.safetensors")
    config = {"architectures": ["VideoAutoencoderPipeline"], "model_type": "VideoAutoencoderPipeline", "micro_frame_size": 17}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
