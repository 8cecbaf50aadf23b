"""Weights, checkpoints and exports of others: nothing in them is run, nothing outside of them is read or written, none takes more than it is."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save, save_file

from cola_dist import storage
from cola_dist.config import AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models.adapter import ActionAdapter
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.published import tensor_shapes, weight_files
from cola_dist.models.world import SpaceTimeDiT, STDiT3
from cola_dist.train.checkpoint import Checkpoint, CheckpointWriter, Position
from tests.models.published import STDIT, stdit3_tensors, write_stdit3, write_wan_vae
from tests.s3 import serve
from tests.security.limits import bounded


class Runs:
    """What unpickling it would do: make a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return (os.open, (str(self.marker), os.O_CREAT | os.O_WRONLY))


def archive(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """As torch.save lays it out."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"archive/{name}", data)
    return buffer.getvalue()


@pytest.mark.parametrize("name", ["model.pt", "model.bin", "model.ckpt", "model.safetensors"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_pickled_code_is_not_run(tmp_path: Path, name: str, wrapped: bool) -> None:
    folder, marker = write_stdit3(tmp_path / "weights"), tmp_path / "marker"
    pickled = pickle.dumps({"state_dict": {"w": Runs(marker)}})
    pickle.loads(pickle.dumps(Runs(marker)))
    assert marker.exists(), "the payload works"
    marker.unlink()
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(archive({"data.pkl": pickled, "version": b"3\n", "byteorder": b"little"}) if wrapped else pickled)
    with bounded(), pytest.raises(UserError, match=f"{name} (cannot be read|holds more than tensors)"):
        STDiT3.from_pretrained(str(folder), STDIT)
    assert not marker.exists()


def test_an_archive_that_unfolds_is_refused(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path / "weights")
    (folder / "model.safetensors").unlink()
    bomb = archive({"data.pkl": bytes(2**28), "version": b"3\n", "byteorder": b"little"}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < 2**20
    (folder / "model.pt").write_bytes(bomb)
    with bounded(cpu_s=5, memory=2**27), pytest.raises(UserError, match="unfolds to more than it is"):
        STDiT3.from_pretrained(str(folder), STDIT)


def test_members_that_lie_over_each_other_are_refused(tmp_path: Path) -> None:
    """Each of the entries is as large as the file, and there are many."""
    folder = write_stdit3(tmp_path / "weights", suffix=".pt")
    (folder / "model.safetensors").unlink(missing_ok=True)
    whole = (folder / "model.pt").read_bytes()
    with zipfile.ZipFile(folder / "model.pt", "a") as file:
        largest = max(file.infolist(), key=lambda member: member.file_size)
        file.filelist += [largest] * 50
        file._didModify = True  # type: ignore[attr-defined]
    assert (folder / "model.pt").stat().st_size < 2 * len(whole)
    with bounded(), pytest.raises(UserError, match="unfolds to more than it is"):
        STDiT3.from_pretrained(str(folder), STDIT)


def test_safetensors_whose_header_lies(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path / "weights")
    lies = {
        "a header of exabytes": (2**60).to_bytes(8, "little") + b"{}",
        "a header without end": (10**6).to_bytes(8, "little") + b"[" * 10**6,
        "a tensor of exabytes": save({"w": torch.zeros(2)}).replace(b'"shape":[2]', b'"shape":[9]'),
    }
    for data in lies.values():
        (folder / "model.safetensors").write_bytes(data)
        with bounded(), pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
            STDiT3.from_pretrained(str(folder), STDIT)
    (folder / "model.safetensors").write_bytes(lies["a header without end"])
    with bounded(), pytest.raises(UserError, match="no header of safetensors"):
        tensor_shapes(str(folder))


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "s3://bucket/secret.safetensors", "sub/model.safetensors"])
def test_an_index_of_shards_names_files_of_its_folder_alone(tmp_path: Path, name: str) -> None:
    folder = write_stdit3(tmp_path / "weights")
    save_file(stdit3_tensors(), tmp_path / "secret.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(UserError, match="1 of them are missing"):
        weight_files(str(folder))


def changed(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields",
    [{"num_res_blocks": 10**9}, {"base_dim": 10**12}, {"dim_mult": [1] * 10**6}, {"dim_mult": [10**12] * 4}, {"x": {"layers": 10**9}}],
)
def test_a_published_config_does_not_ask_for_any_size(tmp_path: Path, fields: dict[str, Any]) -> None:
    folder = write_wan_vae(tmp_path / "vae")
    changed(folder, **fields)
    with bounded(cpu_s=10), pytest.raises(UserError, match=r"config\.json: \w+ (is|has) .*more than"):
        build_autoencoder(AutoencoderConfig(kind="wan", pretrained=str(folder)), bf16=False)


def test_a_config_without_end(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path / "weights")
    (folder / "config.json").write_text("[" * 10**6)
    with bounded(), pytest.raises(UserError, match="is not JSON"):
        STDiT3.from_pretrained(str(folder), STDIT)


def test_our_own_exports_are_checked_like_those_of_others(tmp_path: Path) -> None:
    sizes = {"channels": 3, "patch": 4, "width": 8, "depth": 1, "heads": 2}
    SpaceTimeDiT(**sizes).save_pretrained(str(tmp_path / "world"))
    for shape in (sizes | {"os": 1}, sizes | {"width": "8"}, {"channels": 3}):
        changed(tmp_path / "world", shape=shape)
        with pytest.raises(UserError):
            SpaceTimeDiT.from_pretrained(str(tmp_path / "world"), {"channels": 3})
    ActionAdapter("mlp", 2, 0, 1, 4, 8).save(str(tmp_path / "adapter"))
    for wrong in ({"width": 10**9}, {"width": -1}, {"width": 8.5}, {"action_dim": 10**12}, {"kind": "__import__"}):
        before = (tmp_path / "adapter" / "config.json").read_text()
        changed(tmp_path / "adapter", **wrong)
        with bounded(memory=2**28), pytest.raises(UserError):
            ActionAdapter.load(str(tmp_path / "adapter"))
        (tmp_path / "adapter" / "config.json").write_text(before)
    assert ActionAdapter.load(str(tmp_path / "adapter")).width == 8


POSITION = {"step": 1, "phase": "joint", "recipe": "tiny", "order_hash": "", "adam_steps": {}, "frozen": {}, "record": {}}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint of one buffer."""
    writer = CheckpointWriter(str(tmp_path / "run"), 0, 1, "a", keep=1)
    uri = writer.save(Position(**POSITION), [], {"place": torch.ones(3)}, {}, {"w": (4,)})  # type: ignore[arg-type]
    writer.wait()
    assert Checkpoint(uri).buffers["place"].tolist() == [1, 1, 1]
    return Path(uri)


def remanifest(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    path = checkpoint / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


@pytest.mark.parametrize(
    "name",
    [
        "../../secret",
        "../../../../../../etc/passwd",
        "/etc/passwd",
        "s3://bucket/secret",
        "file:///etc/passwd",
        "sub/rank-00000.safetensors",
    ],
)
def test_a_manifest_names_files_of_its_folder_alone(checkpoint: Path, name: str) -> None:
    save_file({"buffer:0:stolen": torch.ones(1)}, checkpoint.parents[1] / "secret")
    sha256 = hashlib.sha256((checkpoint.parents[1] / "secret").read_bytes()).hexdigest()
    remanifest(checkpoint, lambda manifest: manifest | {"files": {name: sha256}})
    with pytest.raises(UserError, match="which is none of a checkpoint"):
        Checkpoint(str(checkpoint))


def test_a_checkpoint_in_object_storage_writes_no_file_elsewhere(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in object storage is copied here first, to the place that its name leads to."""
    marker = tmp_path / "marker"
    name = f"../../../../../../../../../..{marker}"
    remanifest(checkpoint, lambda manifest: manifest | {"files": {name: "0" * 64}})
    fetched: list[str] = []
    with serve(tmp_path / "store", "bucket") as server:
        for variable, value in server.environment.items():
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr(storage, "download_file", lambda uri, path: fetched.append(str(path)))
        for path in checkpoint.iterdir():
            storage.write_bytes(f"s3://bucket/run/{path.name}", path.read_bytes())
        with pytest.raises(UserError, match="which is none of a checkpoint"):
            Checkpoint("s3://bucket/run")
    assert fetched == []
    assert not marker.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m | {"files": ["a"]},
        lambda m: m | {"files": {"rank-00000.safetensors": 5}},
        lambda m: m | {"shapes": {"w": "ab"}},
        lambda m: m | {"shapes": {"w": [-1]}},
        lambda m: m | {"shapes": {"w": [1.5]}},
        lambda m: m | {"position": {}},
        lambda m: m | {"position": m["position"] | {"__class__": 1}},
        lambda m: m | {"position": m["position"] | {"step": "1"}},
        lambda m: {"format": m["format"]},
    ],
)
def test_a_manifest_of_other_things_is_damaged(checkpoint: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    remanifest(checkpoint, change)
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        Checkpoint(str(checkpoint))
    (checkpoint / "manifest.json").write_text("[" * 10**6)
    with bounded(), pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        Checkpoint(str(checkpoint))


@pytest.mark.parametrize("shape", [[2**31, 2**31], [2**40], [10**300]])
def test_a_shape_beyond_what_is_stored_takes_no_memory(checkpoint: Path, shape: list[int]) -> None:
    remanifest(checkpoint, lambda manifest: manifest | {"shapes": {"w": shape}})
    opened = Checkpoint(str(checkpoint))
    with bounded(memory=2**26), pytest.raises(UserError, match="lacks weight of w"):
        opened.read("weight", "w")


def test_a_checkpoints_file_of_another_kind(checkpoint: Path, tmp_path: Path) -> None:
    marker, path = tmp_path / "marker", checkpoint / "rank-00000.safetensors"
    for data in (pickle.dumps(Runs(marker)), save({"no such name": torch.ones(1)}), save({"weight:0:w": torch.ones(2, 2)})):
        path.write_bytes(data)
        sha256 = hashlib.sha256(data).hexdigest()
        remanifest(checkpoint, lambda manifest, sha256=sha256: manifest | {"files": {path.name: sha256}})  # type: ignore[misc]
        with pytest.raises(UserError, match="cannot be read"):
            Checkpoint(str(checkpoint))
    assert not marker.exists()
