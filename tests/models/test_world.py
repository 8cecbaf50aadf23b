from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cola_dist.errors import UserError
from cola_dist.models.world import SpaceTimeDiT
from cola_dist.models.world.base import checkpoint_blocks, compile_blocks

SHAPE = {"channels": 3, "patch": 4, "width": 16, "depth": 2, "heads": 2}


def dit(seed: int = 0) -> SpaceTimeDiT:
    torch.manual_seed(seed)
    model = SpaceTimeDiT(**SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("frame", range(4))
def test_a_frame_changes_its_own_velocity_and_later_ones_only(frame: int) -> None:
    model = dit()
    x, tau = torch.randn(2, 4, 3, 8, 8), torch.full((2, 4), 0.5)
    changed = x.clone()
    changed[:, frame] += 1.0
    moved = (model.velocity(x, tau, None) - model.velocity(changed, tau, None)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert moved.tolist() == [later >= frame for later in range(4)]


def test_flow_time_is_per_frame() -> None:
    model = dit()
    x, tau = torch.randn(1, 4, 3, 8, 8), torch.full((1, 4), 0.5)
    later = tau.clone()
    later[:, 2] = 0.9
    moved = (model.velocity(x, tau, None) - model.velocity(x, later, None)).abs().amax((0, 2, 3, 4)) > 1e-6
    assert moved.tolist() == [False, False, True, True]


def test_zero_modulation_is_no_modulation_bit_for_bit_and_every_block_listens() -> None:
    model = dit()
    x, tau = torch.randn(2, 4, 3, 8, 8), torch.rand(2, 4)
    modulation = torch.zeros(2, 4, *model.modulation_shape)
    plain = model.velocity(x, tau, None)
    assert torch.equal(plain, model.velocity(x, tau, modulation))
    for block in range(SHAPE["depth"]):
        for row in range(9):
            one = modulation.clone()
            one[:, 3, block, row] = 1.0
            moved = (plain - model.velocity(x, tau, one)).abs().amax((0, 2, 3, 4)) > 1e-7
            assert moved.tolist() == [False, False, False, True], (block, row)


def test_other_frame_sizes_and_lengths_need_no_new_weights() -> None:
    assert dit().velocity(torch.randn(1, 7, 3, 12, 8), torch.rand(1, 7), None).shape == (1, 7, 3, 12, 8)


def test_saved_weights_come_back_with_their_hash(tmp_path: Path) -> None:
    model = dit()
    content_hash = model.save_pretrained(str(tmp_path))
    assert content_hash == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert dit().save_pretrained(str(tmp_path / "again")) == content_hash
    loaded = SpaceTimeDiT.from_pretrained(str(tmp_path), SHAPE)
    assert loaded.content_hash == content_hash
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())


def _edit(folder: Path, **fields: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def _rewrite(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors")
    _edit(folder, sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest())


def test_what_does_not_fit_is_named_with_a_remedy(tmp_path: Path) -> None:
    dit().save_pretrained(str(tmp_path))

    def message(expected: dict[str, int] | None = None) -> str:
        with pytest.raises(UserError) as caught:
            SpaceTimeDiT.from_pretrained(str(tmp_path), expected or SHAPE)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"world.width is 32 but {tmp_path}/config.json has 16: set world.width to 16" in message(SHAPE | {"width": 32})
    good = load_file(tmp_path / "model.safetensors")
    _rewrite(tmp_path, good | {"out.bias": torch.zeros(7)})
    assert "tensor out.bias is (7,), the model needs (48,)" in message()
    _rewrite(tmp_path, {name: tensor for name, tensor in good.items() if name != "tables"})
    assert re.search(r"lacks 1 of \d+ tensors of SpaceTimeDiT \(tables …\)", message())
    _rewrite(tmp_path, good | {"extra": torch.zeros(1)})
    assert "has a tensor extra that the model does not know" in message()
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    assert "sha256" in message()
    _edit(tmp_path, sha256=hashlib.sha256(b"not tensors").hexdigest())
    assert "cannot be read" in message()
    _edit(tmp_path, kind="unet")
    assert "kind 'unet'" in message()
    (tmp_path / "config.json").write_text("{")
    assert "is not JSON" in message()
    (tmp_path / "config.json").write_text("{}")
    assert "save it again" in message()
    (tmp_path / "config.json").unlink()
    assert "config.json is missing: point world.pretrained" in message()


@pytest.mark.parametrize("inside", ["world", "export/world"])
def test_the_folder_of_a_run_or_of_its_export_leads_to_the_generator_in_it(tmp_path: Path, inside: str) -> None:
    dit().save_pretrained(str(tmp_path / inside))
    with pytest.raises(UserError, match=f"did you mean {tmp_path}/{inside}\\?"):
        SpaceTimeDiT.from_pretrained(str(tmp_path), SHAPE)


def test_compiled_blocks_keep_their_names() -> None:
    model = dit()
    names = list(model.state_dict())
    compile_blocks(model)
    assert list(model.state_dict()) == names


def test_compiled_blocks_do_not_compute_products_again() -> None:
    """The compiler has its own mind of what to compute again, unless it is told inside of what it compiles."""
    gradients, operations = [], []
    for keeps in (None, "products"):
        model = dit()
        if keeps:
            checkpoint_blocks(model, "products")
            compile_blocks(model)
        torch.manual_seed(1)
        with FlopCounterMode(display=False) as counter:
            model(torch.randn(2, 4, 3, 8, 8), torch.rand(2, 4), torch.randn(2, 4, *model.modulation_shape)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
        operations.append(counter.get_total_flops())
    assert operations[1] == operations[0]
    for found, wanted in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    with torch.no_grad():  # as looks at held-out clips call it
        assert model(torch.randn(1, 2, 3, 8, 8), torch.rand(1, 2), None).shape == (1, 2, 3, 8, 8)
