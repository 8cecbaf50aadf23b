"""Published folders: what is taken over, what is left out, and what each mistake says."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cola_dist.errors import UserError
from cola_dist.models.published import load_published, weight_files
from cola_dist.models.world import STDiT3
from tests.models.published import STDIT, stdit3_tensors, write_stdit3


@pytest.mark.parametrize(("shards", "suffix"), [(1, ".safetensors"), (3, ".safetensors"), (1, ".pt")])
def test_a_published_folder_is_loaded_without_its_text(tmp_path: Path, shards: int, suffix: str) -> None:
    tensors = stdit3_tensors()
    model = STDiT3.from_pretrained(str(write_stdit3(tmp_path, tensors, shards, suffix)), STDIT)
    assert set(model.state_dict()) < set(tensors)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    found = load_published(model, str(tmp_path), STDiT3.published_drops)
    assert set(found.dropped) == {"cross_attn (12)", "y_embedder (3)"}
    assert found.tensors == len(model.state_dict())
    assert found.sha256 == model.content_hash


def test_other_weights_have_another_hash(tmp_path: Path) -> None:
    hashes = {STDiT3.from_pretrained(str(write_stdit3(tmp_path / str(s), stdit3_tensors(s))), STDIT).content_hash for s in (0, 1)}
    assert len(hashes) == 2


def test_what_was_loaded_is_exported_and_comes_back(tmp_path: Path) -> None:
    model = STDiT3.from_pretrained(str(write_stdit3(tmp_path / "theirs")), STDIT)
    model.save_pretrained(str(tmp_path / "ours"))
    again = STDiT3.from_pretrained(str(tmp_path / "ours"), STDIT)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


def _truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["t_block.1.bias"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def _without(name: str) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        save_file(tensors, folder / "model.safetensors")

    return break_it


def _with_more(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors") | {"img_emb.proj.weight": torch.zeros(2)}, folder / "model.safetensors")


def _config(**fields: object) -> Callable[[Path], None]:
    def break_it(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return break_it


def _evil(folder: Path) -> None:
    class Runs:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (print, ("code of a checkpoint ran",))

    (folder / "model.safetensors").unlink()
    with (folder / "model.pt").open("wb") as file:
        pickle.dump({"w": Runs()}, file)


BROKEN: list[tuple[str, Callable[[Path], None]]] = [
    (r"model\.safetensors cannot be read \(.*\): copy the folder again", _truncated),
    (r"tensor t_block\.1\.bias holds values that are not finite numbers", _nan),
    (r"lacks 1 of \d+ tensors of STDiT3 \(t_block\.1\.bias …\): .* of another family or version", _without("t_block.1.bias")),
    (r"has a tensor img_emb\.proj\.weight that the model does not know: .* of another family or version", _with_more),
    (r"tensor .* is \(.*\), the model needs", lambda folder: None),
    (
        r"config\.json holds a model of kind 'WanTransformer3DModel', not 'stdit3': set world\.kind",
        _config(architectures=["WanTransformer3DModel"]),
    ),
    (r"config\.json: qk_norm is False, Open-Sora v1\.2 has True: choose a checkpoint of that model", _config(qk_norm=False)),
    (r"patch_size is \[2, 2, 2\], Open-Sora v1\.2 has \[1, 2, 2\]: choose", _config(patch_size=[2, 2, 2])),
    (r"world\.depth is 1 but .*config\.json has 2: set world\.depth to 2", _config(depth=2)),
    (r"holds more than tensors|cannot be read", _evil),
    (r"holds no weights: point to a folder", lambda folder: (folder / "model.safetensors").unlink()),
]


@pytest.mark.parametrize(("message", "break_it"), BROKEN, ids=[message[:40] for message, _ in BROKEN])
def test_each_mistake_is_named(tmp_path: Path, message: str, break_it: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_stdit3(tmp_path)
    break_it(folder)
    expected = STDIT
    if message.startswith("tensor .* is"):
        _config(hidden_size=32)(folder)
        expected = STDIT | {"width": 32}
    with pytest.raises(UserError, match=message):
        STDiT3.from_pretrained(str(folder), expected)
    assert "ran" not in capsys.readouterr().out


def test_the_folder_around_it_names_the_one_that_is_meant(tmp_path: Path) -> None:
    write_stdit3(tmp_path / "repository" / "transformer")
    with pytest.raises(UserError, match=r"config\.json is missing: did you mean .*/repository/transformer\?"):
        STDiT3.from_pretrained(str(tmp_path / "repository"), STDIT)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path, shards=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"index\.json names 3 shards, 1 of them are missing \(model-00002-of-00003\.safetensors"):
        STDiT3.from_pretrained(str(folder), STDIT)


def test_several_files_without_an_index_are_refused(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path)
    save_file({"w": torch.zeros(1)}, folder / "other.safetensors")
    with pytest.raises(UserError, match=r"several files of weights \(model\.safetensors, other\.safetensors\) and no index"):
        weight_files(str(folder))
