"""A finished run's models, as its export holds them."""

from __future__ import annotations

from dataclasses import replace

import torch

from cola_dist import storage
from cola_dist.config import RunConfig
from cola_dist.errors import UserError
from cola_dist.methods import build_method
from cola_dist.methods.cotrain import CoTrain
from cola_dist.settings import from_yaml


def export_folder(uri: str) -> str:
    """The export that ``uri`` is or, as a run's folder, has. Raises ``UserError`` where there is none."""
    for folder in (uri, storage.join(uri, "export")):
        if storage.exists(storage.join(folder, "lam", "config.yaml")):
            return folder
    raise UserError(f"{uri} holds no export (no lam/config.yaml): give the folder of a finished run of jobs/cotrain.py, or its export")


def read_run_config(uri: str) -> RunConfig:
    """The configuration that an export (or the run that has it) was trained with, its models being the exported ones."""
    folder = export_folder(uri)
    where = storage.join(folder, "lam", "config.yaml")
    config = from_yaml(storage.read_bytes(where).decode(), where)
    # The null prompt is part of the exported weights.
    world = replace(config.world, pretrained=storage.join(folder, "world"), null_prompt=None)
    return replace(config, world=world, adapt=replace(config.adapt, start=folder))


def load_export(uri: str, device: torch.device, bf16: bool = False) -> CoTrain:
    """All roles of an export, on ``device``, for evaluation. Raises ``UserError`` for what is missing or does not fit."""
    folder, config = export_folder(uri), read_run_config(uri)
    method = build_method(config, bf16)
    if not isinstance(method, CoTrain):
        raise UserError(f"{folder} is of method {config.method}, which has no latent actions: give a run of jobs/cotrain.py")
    from safetensors import SafetensorError
    from safetensors.torch import load

    for role in method.roles():
        if role == "world":
            continue
        where = storage.join(folder, role, "model.safetensors")
        try:
            method.get_submodule(role).load_state_dict(load(storage.read_bytes(where)))
        except FileNotFoundError:
            raise UserError(f"{where} is missing: export the run again, or copy the whole folder") from None
        except SafetensorError as error:
            raise UserError(f"{where} is not a file of safetensors ({error}): copy the whole folder again") from None
        except RuntimeError as error:
            raise UserError(f"{where} does not fit its config.yaml ({str(error).splitlines()[0]}): copy the whole folder again") from None
    return method.to(device).eval()
