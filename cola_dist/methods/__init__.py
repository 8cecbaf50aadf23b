"""What is optimised. `build_method` makes the method that a configuration names."""

from __future__ import annotations

import torch

from cola_dist.config import AUTOENCODERS, RunConfig
from cola_dist.methods.adapt import Adapt
from cola_dist.methods.base import Clips, Method, StepOutput
from cola_dist.methods.cotrain import CoTrain
from cola_dist.methods.pretrain import Pretrain
from cola_dist.methods.schedule import Course, Phase, Span, phases, uses_forward_model
from cola_dist.models.adapter import ActionAdapter
from cola_dist.models.autoencoder import Autoencoder
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.conditioning import ActionConditioning
from cola_dist.models.forward import ForwardModel
from cola_dist.models.lam import LatentActionModel
from cola_dist.models.published import HERE, Place, load_null_prompt, load_role, without_weights
from cola_dist.models.world import KINDS, WanVideo, WorldModel
from cola_dist.models.world.base import checkpoint_blocks, compile_blocks

__all__ = ["Clips", "Course", "Method", "Phase", "Place", "Span", "StepOutput", "build_method", "build_world", "phases"]


def build_world(config: RunConfig, place: Place = HERE) -> WorldModel:
    """The generator of ``config.world``: pretrained and at ``place`` where it names a folder (raises `UserError` if it does not fit), otherwise
    random and in host memory; with the null prompt of ``config.world.null_prompt`` where that names a file (raises as well)."""
    kind = KINDS[config.world.kind]
    wanted = {"channels": AUTOENCODERS[config.autoencoder.kind].channels} | vars(config.world)
    shape = {name: wanted[name] for name in kind.shape_names}
    model: WorldModel
    if config.world.pretrained is not None:
        model = kind.from_pretrained(config.world.pretrained, shape, place)
    else:
        model = without_weights(lambda: kind(**shape)) if place.device.type == "meta" else kind(**shape)
    if config.world.null_prompt is not None and isinstance(model, WanVideo):
        model.take_prompt(*load_null_prompt(config.world.null_prompt, model.text_width, place))
    return model


def build_method(config: RunConfig, bf16: bool, autoencoder: Autoencoder | None = None, place: Place = HERE) -> Method:
    """The method of ``config`` in fp32. What is loaded is at ``place``, all else on the CPU, drawn from ``config.train.seed`` alike on all ranks.

    ``bf16`` turns on autocast inside ``forward`` and ``evaluate``. Of method adapt, LAM and conditioning are loaded from the export
    ``config.adapt.start``. Raises `UserError` if a pretrained generator or autoencoder, or that export, does not fit.

    An ``autoencoder`` that is given takes the place of the one that would be loaded.
    """
    autoencoder = autoencoder or build_autoencoder(config.autoencoder, bf16, place)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        world = build_world(config, place)
        # Seeded again, so that the latent action model starts the same whether the generator was loaded or drawn.
        torch.manual_seed(config.train.seed + 1)
        lam = LatentActionModel(config.lam, config.train.seed)
        actions = (config.lam.tokens, config.lam.bottleneck.dim)
        conditioning = ActionConditioning(
            config.conditioning, *actions, world.modulation_shape, AUTOENCODERS[config.autoencoder.kind].stride
        )
        # Drawn last, so that the rest starts the same with and without it.
        lam.forward_model = ForwardModel(config.lam) if uses_forward_model(config) else None
        adapt = config.adapt
        adapter = ActionAdapter(adapt.kind, adapt.action_dim, adapt.state_dim, *actions, adapt.width) if config.method == "adapt" else None
    if config.train.activation_checkpointing:
        checkpoint_blocks(world, config.train.checkpointing_keeps)
    if config.train.compile:
        compile_blocks(world)
    if config.method == "pretrain":
        return Pretrain(config, bf16, autoencoder, world)
    if adapter is not None:
        for role, module in (("lam", lam), ("conditioning", conditioning)):
            load_role(module, adapt.start, role, place)
        adapter.scale_to(lam.bottleneck)
        return Adapt(config, bf16, autoencoder, lam, conditioning, world, adapter)
    return CoTrain(config, bf16, autoencoder, lam, conditioning, world)
