"""What every generator has to hold, whatever its family."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cola_dist.config import AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.world import KINDS, STDiT3, WorldModel
from cola_dist.models.world.base import PRODUCTS, checkpoint_blocks
from tests.models.published import COSMOS, STDIT, SVD, WAN, write_cosmos, write_opensora_vae, write_stdit3, write_svd, write_wan
from tests.s3 import serve

SHAPES = {"stdit3": STDIT, "wan": WAN, "cosmos": COSMOS, "svd": SVD}
WRITERS: dict[str, Callable[[Path], Path]] = {"stdit3": write_stdit3, "wan": write_wan, "cosmos": write_cosmos, "svd": write_svd}


@pytest.fixture(scope="module", params=SHAPES)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A kind, and a folder with a small one as its authors publish it."""
    return request.param, str(WRITERS[request.param](tmp_path_factory.mktemp(request.param)))


def load(published: tuple[str, str]) -> WorldModel:
    kind, folder = published
    return KINDS[kind].from_pretrained(folder, SHAPES[kind])


def clip(model: WorldModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Three latent frames, the first of them context."""
    torch.manual_seed(0)
    side = max(4, model.patch)  # type: ignore[call-overload]
    return torch.randn(2, 3, model.channels, side, side), torch.tensor([[0.0, 0.5, 0.5]]).expand(2, -1)  # type: ignore[call-overload]


@torch.no_grad()
def test_zero_modulation_is_none_bit_for_bit_and_a_frames_rows_move_it(published: tuple[str, str]) -> None:
    model = load(published)
    x, tau = clip(model)
    plain = model(x, tau, None)
    assert plain.shape == x.shape
    assert plain.dtype == torch.float32
    zero = torch.zeros(2, 3, *model.modulation_shape)
    assert torch.equal(plain, model(x, tau, zero))
    zero[:, 2] = 1.0
    assert not torch.equal(plain[:, 2], model(x, tau, zero)[:, 2])
    base = model.base_modulation(tau)
    assert base.shape == zero.shape
    torch.testing.assert_close(base[:, 1], base[:, 2])
    assert not torch.equal(base[:, 0], base[:, 1])


class Computed(TorchDispatchMode):
    """Counts how often each of `PRODUCTS` is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.times: Counter[str] = Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation in PRODUCTS:
            self.times[operation.name()] += 1
        return operation(*args, **(kwargs or {}))


def stepped(model: WorldModel) -> tuple[dict[str, torch.Tensor], Counter[str]]:
    """Gradients by name where there are any, and how often each of `PRODUCTS` was computed on the way."""
    with Computed() as computed:
        model(*clip(model), None).square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, computed.times


@pytest.mark.parametrize("keeps", ["inputs", "products"])
def test_checkpointing_changes_no_gradient(published: tuple[str, str], keeps: Literal["inputs", "products"]) -> None:
    plain, saving = load(published), load(published)
    checkpoint_blocks(saving, keeps)
    (wanted, once), (found, times) = stepped(plain), stepped(saving)
    assert sum(bool(gradient.any()) for gradient in wanted.values()) > len(list(plain.parameters())) / 2
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient)
    attention = "aten::_scaled_dot_product_flash_attention_for_cpu"
    assert once[attention] > 0
    if keeps == "products":
        assert times == once, "nothing of them is computed again"
    else:
        assert times[attention] == 2 * once[attention]


@torch.no_grad()
def test_features_are_a_row_per_latent_frame(published: tuple[str, str]) -> None:
    model = load(published)
    x, _ = clip(model)
    features = model.features(x)
    assert features.shape[:2] == x.shape[:2]
    assert features.dtype == torch.float32


def test_another_autoencoder_is_named_as_such(published: tuple[str, str]) -> None:
    kind, folder = published
    with pytest.raises(UserError, match=r"the autoencoder's latents have 3 channels but .* has \d+: choose the autoencoder\.kind"):
        KINDS[kind].from_pretrained(folder, SHAPES[kind] | {"channels": 3})


def test_it_is_loaded_from_object_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Generator in shards, and an autoencoder whose sizes are read from its file's header."""
    write_stdit3(tmp_path / "s3" / "models" / "generator", shards=2)
    write_opensora_vae(tmp_path / "s3" / "models" / "vae")
    with serve(tmp_path / "s3", "models") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        remote = STDiT3.from_pretrained("s3://models/generator", STDIT)
        encoder = build_autoencoder(AutoencoderConfig("opensora", "s3://models/vae"), bf16=False)
    local = STDiT3.from_pretrained(str(tmp_path / "s3" / "models" / "generator"), STDIT)
    assert remote.content_hash == local.content_hash
    assert all(torch.equal(tensor, local.state_dict()[name]) for name, tensor in remote.state_dict().items())
    assert encoder.hash == build_autoencoder(AutoencoderConfig("opensora", str(tmp_path / "s3" / "models" / "vae")), bf16=False).hash
