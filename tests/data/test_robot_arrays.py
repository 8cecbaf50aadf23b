"""Damaged and malicious HDF5 and npz files: skipped with a reason, and nothing else is read or filled into memory."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cola_dist.data.sources import Skipped, SourceEpisode
from tests.data.robot_data import (
    STEPS,
    aloha,
    demo,
    npz,
    numbered,
    opened,
    read,
    reasons,
    robomimic,
    write_hdf5,
)
from tests.data.videos import moving_square


def test_damaged_files_are_skipped_with_their_reasons(tmp_path: Path) -> None:
    robomimic(tmp_path / "good.hdf5")
    npz(tmp_path / "good.npz", images=moving_square(STEPS), actions=numbered())
    whole, zipped = (tmp_path / "good.hdf5").read_bytes(), (tmp_path / "good.npz").read_bytes()
    write_hdf5(tmp_path / "other.h5", {"trajectory/image": moving_square(4)})
    write_hdf5(tmp_path / "raw.h5", demo(0, {name: None for name in demo() if "obs" in name}) | {"data/x": [1]})
    write_hdf5(tmp_path / "none.h5", {"mask/train": [b"demo_0"]})
    with h5py.File(tmp_path / "hollow.h5", "w") as file:
        file.create_group("data")
    aloha(tmp_path / "jpeg.h5", {"top": np.full((STEPS, 99), 255, np.uint8)})
    np.savez(tmp_path / "pickled.npz", images=np.array([{"a": 1}], dtype=object))
    contents = {
        "empty.hdf5": b"",
        "empty.npz": b"",
        "cut.hdf5": whole[: len(whole) // 2],
        "head.hdf5": whole[:20],
        "text.hdf5": b"not at all",
        "npz.hdf5": zipped,
        "hdf5.npz": whole,
        "cut.npz": zipped[:-30],
        "pickle.npz": pickle.dumps({"images": [1]}),
    }
    for name, data in contents.items():
        (tmp_path / name).write_bytes(data)
    found = {(skipped.name, skipped.reason) for skipped in read(tmp_path) if isinstance(skipped, Skipped)}
    no_zip = "no npz file, or its end is missing"
    assert {
        *{("empty.hdf5", "empty file"), ("empty.npz", "empty file"), ("cut.hdf5", "damaged file"), ("head.hdf5", "damaged file")},
        *{("text.hdf5", "no HDF5 file"), ("npz.hdf5", "no HDF5 file"), ("hdf5.npz", no_zip), ("cut.npz", no_zip), ("pickle.npz", no_zip)},
        *{("pickled.npz", "pickled arrays"), ("jpeg.h5", "damaged pictures"), ("hollow.h5", "no episodes")},
        *{(name, "neither robomimic's layout nor ALOHA's") for name in ("other.h5", "none.h5")},
        ("raw.h5#x", "no observations"),
    } <= found


def test_no_file_makes_others_be_read(tmp_path: Path) -> None:
    robomimic(tmp_path / "secret" / "a.hdf5")
    video = moving_square(STEPS)
    (tmp_path / "secret" / "raw").write_bytes(video.tobytes())
    source = h5py.VirtualSource(str(tmp_path / "secret" / "a.hdf5"), "data/demo_0/obs/agentview_image", video.shape)
    layout = h5py.VirtualLayout(video.shape, np.uint8)
    layout[:] = source
    links = {"external": h5py.ExternalLink("../secret/a.hdf5", "data/demo_0/obs/agentview_image"), "soft": h5py.SoftLink("/elsewhere")}
    for name, link in links.items():
        write_hdf5(tmp_path / "all" / f"{name}.h5", {"observations/images/top": link})
    write_hdf5(tmp_path / "all" / "group.h5", {"data/demo_0/obs": h5py.ExternalLink("../secret/a.hdf5", "data/demo_0/obs")})
    write_hdf5(tmp_path / "all" / "root.h5", {"data": h5py.ExternalLink("../secret/a.hdf5", "data")})
    with h5py.File(tmp_path / "all" / "virtual.h5", "w") as file:
        file.create_virtual_dataset("observations/images/top", layout)
    with h5py.File(tmp_path / "all" / "stored.h5", "w") as file:
        stored = [(str(tmp_path / "secret" / "raw"), 0, h5py.h5f.UNLIMITED)]
        file.create_dataset("observations/images/top", video.shape, np.uint8, external=stored)
    assert len(opened(tmp_path / "all").items()) == 6
    assert reasons(tmp_path / "all") == {"link to another file"}


def zip_of(path: Path, shape: str, content: bytes, **options: Any) -> None:
    """An npz whose one array has a header of our own."""
    header = f"{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header = header.ljust(-(len(header) + 11) % 64 + len(header)) + b"\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content)


@pytest.mark.parametrize("shape", ["(99999999, 999, 999, 3)", "(12, 48, 64, 3)", "(-1, 48, 64, 3)", "(12, 48, 64, -3)", "'no'", "(" * 99])
def test_npz_whose_headers_do_not_tell_the_truth(tmp_path: Path, shape: str) -> None:
    zip_of(tmp_path / "a.npz", shape, bytes(1000))
    assert reasons(tmp_path) == {"damaged file"}


def test_hdf5_that_declares_more_than_it_holds(tmp_path: Path) -> None:
    """HDF5 fills what was never written with zeros: such a file is small, and its array of any size."""
    shapes = {"long": (10**9, 480, 640, 3), "wide": (12, 20_000, 20_000, 3), "lump": (99, 9000, 9000, 3)}
    for name, shape in shapes.items():
        chunks = (5, 9000, 9000, 3) if name == "lump" else (1, 100, 100, 3)
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file.create_dataset("observations/images/top", shape, np.uint8, chunks=chunks)
    assert [found.reason for found in read(tmp_path) if isinstance(found, Skipped)] == ["declared size beyond reason"] * 3


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(["a.hdf5", "a.npz"]), st.data())
def test_files_cut_off_or_overwritten_anywhere(tmp_path_factory: pytest.TempPathFactory, name: str, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("cut")
    robomimic(folder / "a.hdf5") if name == "a.hdf5" else npz(folder / name, images=moving_square(STEPS), actions=numbered())
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()) or name == "a.hdf5":
        del content[at:]
    else:
        content[at : at + 4] = data.draw(st.binary(min_size=4, max_size=4))
    (folder / name).write_bytes(content)
    for found in read(folder):
        assert isinstance(found, Skipped) or found.video.shape[1:] == (48, 64, 3)


def test_what_comes_before_a_damaged_picture_is_packed(tmp_path: Path) -> None:
    video = np.random.default_rng(0).integers(0, 256, (60, 400, 400, 3), np.uint8)
    with h5py.File(tmp_path / "a.h5", "w") as file:
        images = file.create_dataset("observations/images/top", data=video, chunks=(1, 400, 400, 3), compression="gzip", fletcher32=True)
        file["action"] = numbered(60)
        place = images.id.get_chunk_info(50).byte_offset
    content = bytearray((tmp_path / "a.h5").read_bytes())
    content[place + 1000 : place + 1100] = bytes(100)
    (tmp_path / "a.h5").write_bytes(content)
    episode, skipped = read(tmp_path)
    assert isinstance(episode, SourceEpisode)
    assert 15 <= len(episode.video) <= 50
    assert episode.actions is not None
    np.testing.assert_array_equal(episode.actions, numbered(len(episode.video) - 1))
    assert skipped == Skipped("a.h5", "damaged file")
