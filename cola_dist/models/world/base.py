"""What a generator must offer, and how its weights are kept: ``config.json`` beside ``model.safetensors``."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts, noop_context_fn

from cola_dist.errors import UserError
from cola_dist.models.layers import Past
from cola_dist.models.published import HERE, Loaded, Place, load_published, read_config, without_weights

FORMAT_VERSION = 1
_INSIDE = ("world", "export/world", "transformer", "unet")
"""Where the generator lies in a run's folder, in its export, and in what authors publish."""
PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten.convolution.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)
"""Fused attention and products with weights: nearly all of what a block computes, and a part of what it keeps. Batched products are not among them,
or attention that is written out would keep its weights."""


class WorldModel(nn.Module):
    """A pretrained video generator that takes per-frame latent-action modulation."""

    kind: ClassVar[str]
    """Name of the architecture in ``config.json``."""
    shape_names: ClassVar[tuple[str, ...]]
    """The constructor's arguments, all whole numbers, as ``config.json`` keeps them."""
    shape_more: ClassVar[tuple[str, ...]] = ()
    """Further arguments of the constructor, which ``config.json`` keeps where they are not 0."""
    published_class: ClassVar[str] = ""
    """What the config.json of its authors calls the architecture; empty where nobody else publishes it."""
    published_model: ClassVar[str] = ""
    """What people call the published model that fits."""
    published_fixed: ClassVar[Mapping[str, Any]] = {}
    """Fields of a published config.json that have one value here."""
    published_drops: ClassVar[str] = "(?!)"
    """Names of published tensors that are left out, as `cola_dist.models.published.load_published` takes them."""
    content_hash: str | None = None
    """Hash of the files that the weights came from; none = random weights."""
    loaded: Loaded | None = None
    """What became of the tensors in those files."""
    prompt: Loaded | None = None
    """The file of the null prompt; none where none was given."""

    @property
    def shape(self) -> dict[str, int]:
        """The constructor's arguments."""
        more = {name: getattr(self, name) for name in self.shape_more}
        return {name: getattr(self, name) for name in self.shape_names} | {name: value for name, value in more.items() if value}

    @classmethod
    def published_shape(cls, config: Mapping[str, Any], where: str) -> dict[str, int]:
        """Those of the constructor's arguments that a published ``config.json`` tells. Raises `UserError` for a variant that is not known here."""
        for name, value in cls.published_fixed.items():
            if config.get(name, value) != value:
                raise UserError(f"{where}: {name} is {config[name]}, {cls.published_model} has {value}: choose a checkpoint of that model")
        try:
            return cls.published_sizes(config)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise UserError(
                f"{where} is not the config.json of {cls.published_model} ({error!r}): copy it again from its origin, or choose that model"
            ) from None

    @classmethod
    def published_sizes(cls, config: Mapping[str, Any]) -> dict[str, int]:
        """`published_shape` of a config.json that has the fixed fields. Raises ``KeyError`` or ``ValueError`` where it is of another model."""
        raise NotImplementedError

    @property
    @abstractmethod
    def modulation_shape(self) -> tuple[int, ...]:
        """What conditioning must produce per latent frame."""

    @abstractmethod
    def velocity(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """Velocity ``[B, L, C, h, w]`` of ``x_tau [B, L, C, h, w]`` at flow times ``tau [B, L]`` (0 = clean context).

        ``modulation [B, L, *modulation_shape]`` is added to what the flow time gives; none = the generator as it was pretrained.
        """

    @abstractmethod
    def base_modulation(self, tau: Tensor) -> Tensor:
        """What the flow time alone gives to every block, ``[B, L, *modulation_shape]`` for ``tau [B, L]``; actions are added to it."""

    @abstractmethod
    def features(self, x0: Tensor) -> Tensor:
        """What the generator makes of clean latents ``x0 [B, L, C, h, w]`` without any action: fp32 ``[B, L, F]``, places pooled to a coarse grid."""

    def new_past(self) -> list[Past] | None:
        """What calls on successive frames share where no frame sees a later one: a `Past` per temporal layer. None where frames see later ones."""
        return None

    def velocity_after(self, past: list[Past], x_tau: Tensor, tau: Tensor, modulation: Tensor | None) -> Tensor:
        """`velocity` of frames that stand after those of the first call with the same ``past`` (`new_past`), which are not passed again."""
        raise NotImplementedError

    def forward(self, x_tau: Tensor, tau: Tensor, modulation: Tensor | None, past: list[Past] | None = None) -> Tensor:
        """`velocity`, as a call of the module: engines that partition parameters (ZeRO stage 3) gather them in the call's hooks."""
        return self.velocity(x_tau, tau, modulation) if past is None else self.velocity_after(past, x_tau, tau, modulation)

    @abstractmethod
    def repeated_blocks(self) -> Sequence[nn.Module]:
        """The blocks that may be compiled and checkpointed one by one."""

    def save_pretrained(self, uri: str) -> str:
        """Write ``config.json`` and ``model.safetensors`` (fp32) into the folder ``uri``; return the sha256 of the weights' file."""
        from safetensors.torch import save

        from cola_dist import storage

        weights = save({name: tensor.detach().float().cpu().contiguous() for name, tensor in self.state_dict().items()})
        content_hash = hashlib.sha256(weights).hexdigest()
        config = {"format": FORMAT_VERSION, "kind": self.kind, "shape": self.shape, "sha256": content_hash}
        storage.write_bytes(storage.join(uri, "model.safetensors"), weights)
        storage.write_bytes(storage.join(uri, "config.json"), json.dumps(config, indent=2).encode() + b"\n")
        return content_hash

    @classmethod
    def from_pretrained(cls, uri: str, expected: Mapping[str, int], place: Place = HERE) -> Self:
        """Load the folder ``uri`` (path, ``s3://...`` or ``embedded:NAME``): a model of this kind and of the ``expected`` shape, at ``place``.

        Raises `UserError` that names the field or tensor which does not fit, and the remedy.
        """

        config, where = read_config(uri, "world.pretrained", _INSIDE), f"{uri}/config.json"
        published = config.get("_class_name") or next(iter(config.get("architectures") or ()), None)
        if not published:
            _check_format(config, where)
        if (published or config["kind"]) != (cls.published_class if published else cls.kind):
            held = repr(published or config["kind"])
            raise UserError(f"{where} holds a model of kind {held}, not {cls.kind!r}: set world.kind or choose another world.pretrained")
        shape = dict(expected) | cls.published_shape(config, where) if published else config["shape"]
        for field, value in expected.items():
            if shape.get(field) != value:
                if field == "channels":
                    fit = "choose the autoencoder.kind that it was trained on, or another world.pretrained"
                    raise UserError(f"the autoencoder's latents have {value} channels but {where} has {shape.get(field)}: {fit}")
                remedy = f"set world.{field} to {shape.get(field)} or choose another world.pretrained"
                raise UserError(f"world.{field} is {value} but {where} has {shape.get(field)}: {remedy}")
        if shape.keys() - set(cls.shape_more) != set(cls.shape_names) or not all(type(side) is int for side in shape.values()):
            raise UserError(
                f"{where} does not say how large the generator is, in {', '.join(cls.shape_names)}: save it again with this version"
            )
        model: Self = without_weights(lambda: cls(**shape))
        if published:
            model.loaded = load_published(model, uri, model.published_drops, place)
            model.content_hash = model.loaded.sha256
        else:
            model.loaded = load_published(model, uri, "(?!)", place, config["sha256"])
            model.content_hash = config["sha256"]
        return model


def _check_format(config: dict[str, Any], where: str) -> None:
    if config.get("format") != FORMAT_VERSION or not isinstance(config.get("shape"), dict) or not {"kind", "sha256"} <= set(config):
        raise UserError(f"{where} is not a generator's config of format {FORMAT_VERSION}: save it again with this version")


def checkpoint_blocks(model: WorldModel, keeps: Literal["inputs", "products"]) -> None:
    """Let each block keep no more for backward, which computes the rest again; in place, before `compile_blocks`.

    ``inputs``: what the block is given. ``products``: and what its `PRODUCTS` gave.
    """
    contexts = partial(create_selective_checkpoint_contexts, _kept) if keeps == "products" else noop_context_fn
    for block in model.repeated_blocks():
        # Inside of the block: where it is compiled, the compiler is to know what it may compute again.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


def _kept(_: Any, operation: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    # A bias that is added in place, as DeepSpeed's linear layer of ZeRO stage 3 does, changes the product that is kept: not to be added once more.
    keep = operation in PRODUCTS or operation is torch.ops.aten.add_.Tensor
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(model: WorldModel) -> None:
    """``torch.compile`` each transformer block in place; parameter names stay as they are."""
    for block in model.repeated_blocks():
        block.compile()
