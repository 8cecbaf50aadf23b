"""Small models in the layouts that their authors publish, with random weights: text layers and all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cola_dist.models.opensora_vae import OpenSoraVae
from cola_dist.models.published import load_published
from cola_dist.models.world import STDiT3

WAN = {"channels": 16, "patch": 2, "width": 24, "depth": 2, "heads": 2, "mlp_width": 40, "text_width": 20}
COSMOS = {"channels": 16, "patch": 2, "width": 48, "depth": 2, "heads": 2, "fps": 5}
SVD = {"channels": 4, "patch": 8, "width": 32, "depth": 1, "heads": 1, "fps": 5}
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


def load_theirs(kind: Any, folder: Path) -> Any:
    """A diffusers model of class ``kind`` with the folder's weights. (Its own ``from_pretrained`` asks for another package.)"""
    model = kind.from_config(json.loads((folder / "config.json").read_text()))
    load_published(model, str(folder), drops="(?!)")
    return model.eval()


def write_wan(folder: Path, seed: int = 0) -> Path:
    """Wan's transformer as diffusers saves it, in shards."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=20, ffn_dim=40, num_layers=2
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder, max_shard_size="20KB")
    return folder


def write_wan_vae(folder: Path, seed: int = 0) -> Path:
    """Wan's autoencoder as diffusers saves it."""
    from diffusers import AutoencoderKLWan

    torch.manual_seed(seed)
    AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(folder)
    return folder


def write_cosmos(folder: Path, seed: int = 0) -> Path:
    """Cosmos-Predict2's transformer as diffusers saves it."""
    from diffusers import CosmosTransformer3DModel

    torch.manual_seed(seed)
    model = CosmosTransformer3DModel(
        in_channels=17,
        out_channels=16,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=2,
        rope_scale=(1.0, 3.0, 3.0),
        extra_pos_embed_type=None,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def write_svd(folder: Path, seed: int = 0) -> Path:
    """Stable Video Diffusion's UNet as diffusers saves it."""
    from diffusers import UNetSpatioTemporalConditionModel

    torch.manual_seed(seed)
    model = UNetSpatioTemporalConditionModel(
        block_out_channels=(32, 64, 128, 128), num_attention_heads=(1, 2, 4, 4), layers_per_block=1, num_frames=5
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def write_svd_vae(folder: Path, seed: int = 0) -> Path:
    """Stable Video Diffusion's autoencoder as diffusers saves it."""
    from diffusers import AutoencoderKLTemporalDecoder

    torch.manual_seed(seed)
    AutoencoderKLTemporalDecoder(block_out_channels=(32,) * 4, down_block_types=("DownEncoderBlock2D",) * 4).save_pretrained(folder)
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
