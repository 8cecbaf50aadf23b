"""The embedding of the empty prompt that Wan is given: from a file into the weights, and out with them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cola_dist.config import AutoencoderConfig, RunConfig, WorldConfig
from cola_dist.errors import UserError
from cola_dist.methods import build_world
from cola_dist.models.world import WanVideo
from cola_dist.recipes import wan
from tests.models.published import WAN, load_theirs, write_wan
from tests.s3 import serve


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wan(tmp_path_factory.mktemp("wan"))


def config(folder: Path | str, prompt: Path | str | None) -> RunConfig:
    sizes = {name: WAN[name] for name in ("patch", "width", "depth", "heads", "mlp_width", "text_width")}
    world = WorldConfig(kind="wan", pretrained=str(folder), null_prompt=None if prompt is None else str(prompt), **sizes)
    return replace(wan(), autoencoder=AutoencoderConfig("wan"), world=world)


def rows(count: int = 7) -> Tensor:
    return torch.randn(count, WAN["text_width"], generator=torch.Generator().manual_seed(3))


def written(path: Path, tensors: dict[str, Tensor]) -> Path:
    save_file(tensors, path)
    return path


@torch.no_grad()
def test_it_is_diffusers_forward_with_that_prompt(folder: Path, tmp_path: Path) -> None:
    from diffusers import WanTransformer3DModel

    x, tau = torch.randn(2, 3, 16, 4, 4), torch.rand(2, 3)
    times = (1000 * tau).repeat_interleave(4, 1)
    reference = load_theirs(WanTransformer3DModel, folder)(x.transpose(1, 2), times, rows().expand(2, -1, -1), return_dict=False)[0]
    for shape in ((7, 20), (1, 7, 20)):
        model = build_world(config(folder, written(tmp_path / "prompt.safetensors", {"embedding": rows().reshape(shape).clone()})))
        out = model(x, tau, None)
        assert float((out - reference.transpose(1, 2)).abs().max() / reference.abs().max()) < 1e-5
    assert not torch.equal(out, build_world(config(folder, None))(x, tau, None))


@torch.no_grad()
def test_it_is_hashed_and_saved_with_the_weights(folder: Path, tmp_path: Path) -> None:
    paths = [written(tmp_path / f"{count}.safetensors", {"embedding": rows(count)}) for count in (5, 6)]
    plain, model, other = (build_world(config(folder, path)) for path in (None, *paths))
    assert len({plain.content_hash, model.content_hash, other.content_hash}) == 3
    assert plain.prompt is None
    assert model.prompt is not None
    assert model.prompt.tensors == 1
    assert model.prompt != other.prompt
    x, tau = torch.randn(1, 2, 16, 4, 4), torch.rand(1, 2)
    model.save_pretrained(str(tmp_path / "saved"))
    again = build_world(config(tmp_path / "saved", None))
    assert isinstance(again, WanVideo)
    assert again.prompt_tokens == 5
    assert torch.equal(again(x, tau, None), model(x, tau, None))
    assert torch.equal(build_world(config(tmp_path / "saved", paths[1]))(x, tau, None), other(x, tau, None))


def test_it_is_read_from_object_storage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "s3" / "models").mkdir(parents=True)
    path = written(tmp_path / "s3" / "models" / "null.safetensors", {"embedding": rows()})
    local = build_world(config(folder, path))
    with serve(tmp_path / "s3", "models") as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        remote = build_world(config(folder, "s3://models/null.safetensors"))
    assert remote.content_hash == local.content_hash


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "width": (
        {"embedding": torch.zeros(4, 21)},
        r"tensor embedding is \(4, 21\) of torch.float32: world.null_prompt is to be .* \[n, 20\]",
    ),
    "batch": ({"embedding": torch.zeros(2, 4, 20)}, r"tensor embedding is \(2, 4, 20\)"),
    "empty": ({"embedding": torch.zeros(0, 20)}, r"tensor embedding is \(0, 20\)"),
    "long": ({"embedding": torch.zeros(513, 20)}, r"at most 512 rows"),
    "whole numbers": ({"embedding": torch.zeros(4, 20, dtype=torch.int64)}, r"of torch.int64"),
    "not a number": ({"embedding": torch.full((4, 20), torch.nan)}, r"holds values that are not finite numbers: copy the folder again"),
    "several": ({"a": torch.zeros(4, 20), "b": torch.zeros(4, 20)}, r"holds 2 tensors: world.null_prompt is to be"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_holds_something_else_is_refused(folder: Path, tmp_path: Path, case: str) -> None:
    tensors, message = BAD[case]
    path = written(tmp_path / "prompt.safetensors", tensors)
    with pytest.raises(UserError, match=f"{re.escape(str(path))}.*{message}") as refused:
        build_world(config(folder, path))
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"embedding": rows()}, tmp_path / "prompt.pt")
    (tmp_path / "cut.safetensors").write_bytes(written(tmp_path / "whole.safetensors", {"embedding": rows()}).read_bytes()[:-40])
    for name, message in (
        ("absent.safetensors", r"is no file of safetensors that is there: world.null_prompt is to be"),
        ("prompt.pt", r"is no file of safetensors that is there: world.null_prompt is to be"),
        ("cut.safetensors", r"cannot be read .*: copy the folder again"),
    ):
        with pytest.raises(UserError, match=f"{name} {message}"):
            build_world(config(folder, tmp_path / name))
