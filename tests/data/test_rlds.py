"""RLDS episodes as TFDS writes them: exact values, counted damage, and what a user is told; the files are written here, byte by byte."""

from __future__ import annotations

import gzip
import json
import pickle
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.sources import Skipped, SourceEpisode, Unusable
from cola_dist.data.sources.cut import CutRules
from cola_dist.data.sources.pictures import decode_pictures
from cola_dist.data.sources.rlds import RldsOrigin
from cola_dist.data.sources.tfrecord import Values
from cola_dist.errors import UserError
from tests.data.tfrecords import encode_example, framed, records_file
from tests.data.videos import moving_square, real_videos
from tests.s3 import serve

STEPS = 6
SIZES = [((48, 64), 24, (24, 32)), ((48, 64), 100, (48, 64)), ((33, 51), 64, (32, 50)), ((90, 60), 31, (46, 30))]
FILE = "toy-train.tfrecord-00000-of-00001"
WHOLE = CutRules(min_seconds=0.5, scene_cut=0.0, still=0.0)


def pictures(video: NDArray[np.uint8], codec: str = "png") -> list[bytes]:
    encoded = []
    for pixels in video:
        encoder: Any = av.CodecContext.create(codec, "w")
        encoder.width, encoder.height, encoder.time_base = pixels.shape[1], pixels.shape[0], Fraction(1, 5)
        encoder.pix_fmt = "rgb24" if codec == "png" else "yuvj444p"
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format=encoder.pix_fmt)
        frame.pts = 0
        encoded.append(b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)]))
    return encoded


def episode(number: int, changed: Mapping[str, Values | None] | None = None, steps: int = STEPS) -> dict[str, Values]:
    """A whole one; ``changed`` replaces features below ``steps`` or, with none, leaves them out."""
    rng = np.random.default_rng(number)
    made: dict[str, Values | None] = {
        "steps/action": rng.normal(size=steps * 3).astype(np.float32),
        "steps/observation/image": pictures(moving_square(steps, 16, 24, seed=number)),
        "steps/observation/state": rng.normal(size=steps * 2).astype(np.float32),
        "steps/language_instruction": [f"Öffne {number}".encode()] * steps,
        "steps/is_first": np.eye(1, steps, dtype=np.int64)[0],
    }
    made |= {f"steps/{name}": values for name, values in (changed or {}).items()}
    return {name: values for name, values in made.items() if values is not None}


def tensor(dtype: str, *shape: int) -> dict[str, Any]:
    return {"tensor": {"shape": {"dimensions": [str(side) for side in shape]}, "dtype": dtype, "encoding": "none"}}


def picture(channels: int = 3, dtype: str = "uint8") -> dict[str, Any]:
    return {"image": {"shape": {"dimensions": ["16", "24", str(channels)]}, "dtype": dtype, "encodingFormat": "png"}}


def features_json(observation: Mapping[str, Any], action: Mapping[str, Any]) -> str:
    def group(parts: Mapping[str, Any]) -> dict[str, Any]:
        return {"featuresDict": {"features": dict(parts)}}

    steps = group({"observation": group(observation), "action": action, "language_instruction": {"text": {}}, "is_first": tensor("bool")})
    return json.dumps(group({"steps": {"sequence": {"feature": steps, "length": "-1"}}}))


FEATURES = features_json({"image": picture(), "state": tensor("float32", 2)}, tensor("float32", 3))


def write(folder: Path, episodes: Sequence[Mapping[str, Values]], file: str = FILE, features: str = FEATURES) -> Path:
    """Returns the file of records."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(records_file(episodes))
    if features:
        (path.parent / "features.json").write_text(features)
    return path


def opened(folder: Path | str, **options: Any) -> RldsOrigin:
    """As a task gets it."""
    given: dict[str, Any] = {"resolution": 64, "rules": WHOLE} | options
    origin: RldsOrigin = pickle.loads(pickle.dumps(RldsOrigin(str(folder), "toy", **given)))
    return origin


def read(folder: Path | str, **options: Any) -> tuple[list[SourceEpisode], list[Skipped]]:
    """Segments, and what is left out."""
    origin = opened(folder, **options)
    found = [one for item in origin.items() for one in origin.episodes(item)]
    return [one for one in found if isinstance(one, SourceEpisode)], [one for one in found if isinstance(one, Skipped)]


def reasons(skipped: Sequence[Skipped]) -> Counter[str]:
    return Counter(one.reason for one in skipped)


def contents(episodes: Sequence[SourceEpisode]) -> list[tuple[Any, ...]]:
    """All that they hold, in a form that compares."""
    arrays = [[rows if rows is None else rows.tobytes() for rows in (one.video, one.actions, one.state)] for one in episodes]
    return [(one.key, one.group, one.split, one.fps, one.meta, *rows) for one, rows in zip(episodes, arrays, strict=True)]


def test_values_come_back_exactly(tmp_path: Path) -> None:
    path = write(tmp_path, [episode(number) for number in range(4)])
    origin = opened(tmp_path, fps=7.5, licence="CC BY 4.0")
    assert (origin.source, origin.domain, origin.camera) == ("toy", "robot", "image")
    (item,) = origin.items()
    assert (item.name, item.size) == (FILE, path.stat().st_size)
    found, skipped = read(tmp_path, fps=7.5, licence="CC BY 4.0")
    assert (len(found), skipped) == (4, [])
    for number, one in enumerate(found):
        made = episode(number)
        np.testing.assert_array_equal(one.video, moving_square(STEPS, 16, 24, seed=number))
        assert one.actions is not None
        assert one.state is not None
        assert one.actions.dtype == one.state.dtype == np.float32
        np.testing.assert_array_equal(one.actions, np.reshape(made["steps/action"], (STEPS, 3))[:-1])
        np.testing.assert_array_equal(one.state, np.reshape(made["steps/observation/state"], (STEPS, 2)))
        assert (one.key, one.fps, one.note) == (f"toy-train-00000-of-00001-{number:06d}-00000", 7.5, "")
        assert one.recording == one.group == f"{FILE}#{number}"
        place = {"dataset": "toy", "file": FILE, "record": number, "start_s": 0.0, "end_s": 0.8}
        about = {"task": f"Öffne {number}", "camera": "image", "embodiment": "unknown", "licence": "CC BY 4.0", "provenance": place}
        assert one.meta == {**about, "action": "action", "state": "observation/state"}
    (tmp_path / "features.json").unlink()
    assert contents(found) == contents(read(tmp_path, fps=7.5, licence="CC BY 4.0")[0]), "the records alone tell as much"
    assert read(tmp_path)[0][0].meta["licence"] == "as the original dataset"
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert contents(found) == contents(read(tmp_path, fps=7.5, licence="CC BY 4.0")[0])


def test_long_episodes_are_cut_and_resampled(tmp_path: Path) -> None:
    write(tmp_path, [episode(0, steps=50)])
    found, _ = read(tmp_path, fps=10.0, rules=CutRules(fps=5.0, segment_frames=10, min_seconds=1.0, scene_cut=0.0, still=0.0))
    whole = moving_square(50, 16, 24)
    np.testing.assert_array_equal(np.concatenate([one.video for one in found]), whole[::2])
    assert {one.group for one in found} == {f"{FILE}#0"}
    assert [one.key[-12:] for one in found] == [f"000000-{index:05d}" for index in range(3)]
    assert found[1].meta["provenance"]["start_s"] == 2.0
    rows = np.reshape(episode(0, steps=50)["steps/action"], (50, 3))
    assert found[0].actions is not None
    np.testing.assert_allclose(found[0].actions[3], rows[6:8].mean(0), rtol=1e-6)


def test_a_split_in_the_name_holds(tmp_path: Path) -> None:
    files = {name: f"toy-{name}.tfrecord-00000-of-00001" for name in ("train", "val", "test", "all")}
    for file in [*files.values(), "val.tfrecord"]:
        write(tmp_path, [episode(0)], file, features="")
    splits = {one.meta["provenance"]["file"]: one.split for one in read(tmp_path)[0]}
    assert [splits[file] for file in files.values()] == ["train", "heldout", "heldout", ""]
    assert splits["val.tfrecord"] == ""


@pytest.mark.parametrize("described", [True, False])
def test_a_dict_of_action_parts_is_joined_in_sorted_order(tmp_path: Path, described: bool) -> None:
    world, gripper = np.arange(STEPS * 3, dtype=np.float32), 100 + np.arange(STEPS, dtype=np.int64)
    action = {"featuresDict": {"features": {"world": tensor("float32", 3), "gripper": tensor("int32")}}}
    features = features_json({"image": picture()}, action) if described else ""
    write(tmp_path, [episode(0, {"action": None, "action/world": world, "action/gripper": gripper})], features=features)
    (one,), _ = read(tmp_path)
    assert one.actions is not None
    np.testing.assert_array_equal(one.actions, [[100 + t, 3 * t, 3 * t + 1, 3 * t + 2] for t in range(STEPS - 1)])
    assert one.meta["action"] == "action/gripper, action/world"


def test_bad_actions_leave_the_video(tmp_path: Path) -> None:
    good = np.arange(STEPS * 3, dtype=np.float32)
    unfinished, unused = good.copy(), good.copy()
    unfinished[7] = np.nan
    unused[-1] = np.inf  # after the last frame: no transition shows that action
    state = np.full(STEPS * 2, np.inf, np.float32)
    changes: list[dict[str, Values | None]] = [
        {"action": unfinished},
        {"action": good[:-3]},
        {"action": None},
        {"action": unused},
        {"observation/state": state},
        {"action": unfinished, "observation/state": state},
    ]
    write(tmp_path, [episode(number, change) for number, change in enumerate(changes)])
    found, skipped = read(tmp_path)
    assert skipped == []
    assert "".join("A" * (one.actions is not None) + "S" * (one.state is not None) + " " for one in found) == "S S S AS A  "
    assert [bool(one.meta["action"]) for one in found] == [one.actions is not None for one in found]
    assert [one.note for one in found] == [
        "without actions (not finite)",
        "without actions (not one row per frame)",
        "without actions (not one row per frame)",
        "",
        "without state (not finite)",
        "without actions (not finite) and state (not finite)",
    ]


def test_episodes_without_a_moving_picture_are_counted(tmp_path: Path) -> None:
    video = moving_square(STEPS, 16, 24)
    broken = pictures(video)
    broken[1] = broken[1][:60]
    episodes = [
        episode(0, {"observation/image": pictures(np.zeros_like(video))}),
        episode(1, {"observation/image": pictures(np.repeat(video[:1], STEPS, 0))}),
        episode(2, {"observation/image": None}),
        episode(3, {"observation/image": [b""] * STEPS}),
        episode(4, steps=2),
        episode(5),
        episode(6, {"observation/image": broken}),
        episode(7),
    ]
    path = write(tmp_path, episodes)
    place = path.stat().st_size
    path.write_bytes(path.read_bytes() + framed(b"\xff\xff no example"))
    found, skipped = read(tmp_path)
    assert [one.meta["provenance"]["record"] for one in found] == [5, 7]
    why = ["black camera", "static camera", "no video", "no video", "shorter than 0.5 s", "damaged pictures", "damaged record"]
    assert [one.reason for one in skipped] == why
    names = [f"{FILE}#{number}" for number in (0, 1, 2, 3, 4, 6, 8)]
    assert [one.name.partition(" at ")[0] for one in skipped] == names
    assert skipped[-1].name.startswith(f"{names[-1]} at byte {place}: ")


def test_pictures_before_the_damage_are_kept(tmp_path: Path) -> None:
    images = pictures(moving_square(20, 16, 24))
    images[12] = images[12][:60]
    write(tmp_path, [episode(0, {"observation/image": images}, steps=20)])
    (one,), skipped = read(tmp_path)
    np.testing.assert_array_equal(one.video, moving_square(20, 16, 24)[:12])
    assert skipped == [Skipped(f"{FILE}#0", "damaged pictures")]


@pytest.mark.parametrize("codec", ["png", "mjpeg"])
@pytest.mark.parametrize(("size", "resolution", "expected"), SIZES)
def test_scaled_down_to_even_sides_and_never_up(codec: str, size: tuple[int, int], resolution: int, expected: tuple[int, int]) -> None:
    video = moving_square(3, *size)
    small = np.stack(list(decode_pictures(pictures(video, codec), resolution)))
    assert small.shape == (3, *expected, 3)
    assert np.abs(small.mean((0, 1, 2)) - video.mean((0, 1, 2))).max() < 3, "colours stay"


def test_a_header_that_claims_gigabytes_is_damage() -> None:
    (png,) = pictures(moving_square(1, 16, 16), "png")
    claim = png[:16] + (30_000).to_bytes(4, "big") * 2 + png[24:29]
    claim += zlib.crc32(claim[12:29]).to_bytes(4, "big") + png[33:]
    assert len(list(decode_pictures([png], 16))) == 1
    with pytest.raises(Unusable, match="damaged pictures"):
        list(decode_pictures([claim], 16))


@pytest.mark.parametrize("described", [True, False])
def test_the_first_camera_that_shows_something(tmp_path: Path, described: bool) -> None:
    still = np.zeros((STEPS, 16, 24, 3), np.uint8)
    cameras = {"a_depth": still + 90, "b": still, "c": moving_square(STEPS, 16, 24)}
    images: dict[str, Values | None] = {f"observation/{name}": pictures(video) for name, video in cameras.items()}
    features = features_json({"a_depth": picture(1, "uint16"), "b": picture(), "c": picture()}, tensor("float32", 3))
    write(tmp_path, [episode(0, {"observation/image": None} | images)], features=features if described else "")
    (one,), skipped = read(tmp_path)
    assert (one.meta["camera"], skipped) == ("c", [])
    assert contents([one]) == contents(read(tmp_path, camera="c")[0])
    with pytest.raises(UserError, match=r"no camera wrist; there are b, c$"):
        read(tmp_path, camera="wrist")
    with pytest.raises(UserError, match=r"no usable episode in 1 files \(1 black camera\)"):
        read(tmp_path, camera="b")


def test_the_driver_reads_up_to_the_first_usable_episode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    black: dict[str, Values | None] = {"observation/image": pictures(np.zeros((STEPS, 16, 24, 3), np.uint8))}
    files = [f"toy-train.tfrecord-0000{number}-of-00004" for number in range(4)]
    for number, changes in enumerate((black, black, {}, {})):
        write(tmp_path, [episode(number, changes)], files[number])
    asked, real = list[str](), storage.read_bytes

    def watched(uri: str, *part: int) -> bytes:
        asked.append(Path(uri).name)
        return real(uri, *part)

    monkeypatch.setattr(storage, "read_bytes", watched)
    assert RldsOrigin(str(tmp_path), "toy", 64, WHOLE).camera == "image"
    assert asked == ["features.json", *files[:3]]


@pytest.mark.parametrize("place", [0, 6, 9, 12, 500, -1])
def test_a_flipped_byte_costs_one_record(tmp_path: Path, place: int) -> None:
    episodes = [episode(number) for number in range(5)]
    path = write(tmp_path, episodes)
    whole = read(tmp_path)[0]
    records = [framed(encode_example(one)) for one in episodes]
    for damaged in (0, 2, 4):
        start = len(b"".join(records[:damaged]))
        data = bytearray(b"".join(records))
        data[start + place % len(records[damaged])] ^= 0x10
        path.write_bytes(data)
        found, skipped = read(tmp_path)
        kept = whole[:damaged] + whole[damaged + 1 :]
        assert [one.key for one in found] == [one.key for one in kept]
        assert all(np.array_equal(one.video, other.video) for one, other in zip(found, kept, strict=True))
        assert reasons(skipped) == {"damaged record": 1}
        what = "its header is damaged" if 0 <= place < 12 else "the checksum of its data differs"
        assert skipped[0].name.startswith(f"{FILE}#{damaged} at byte {start}: {what}")


def test_truncated_empty_and_foreign_files_do_not_stop_the_others(tmp_path: Path) -> None:
    write(tmp_path, [episode(0)], "a.tfrecord")
    cut = write(tmp_path, [episode(number) for number in (1, 2, 3)], "b.tfrecord")
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "c.tfrecord").write_bytes(b"")
    (tmp_path / "d.tfrecord").write_bytes(b"this is no TFRecord at all\n" * 50)
    stub = write(tmp_path, [episode(4)], "e.tfrecord")
    stub.write_bytes(stub.read_bytes() + b"\x07\x00")
    found, skipped = read(tmp_path)
    assert [one.recording for one in found] == ["a.tfrecord#0", "b.tfrecord#0", "b.tfrecord#1", "e.tfrecord#0"]
    assert reasons(skipped) == {"damaged record": 3, "empty file": 1}
    assert [one.name.split(" at ")[0] for one in skipped] == ["b.tfrecord#2", "c.tfrecord", "d.tfrecord#0", "e.tfrecord#1"]
    assert "100 bytes too early" in skipped[0].name


def test_keys_are_unique_safe_and_do_not_depend_on_other_files(tmp_path: Path) -> None:
    names = ["a b.tfrecord", "a-b.tfrecord", "deep/a b.tfrecord", "ä.tfrecord", "a.tfrecord-00000-of-00001", f"1.0.0/{FILE}"]
    for name in names:
        write(tmp_path, [episode(0)], name, features="")
    keys = {one.meta["provenance"]["file"]: one.key for one in read(tmp_path)[0]}
    assert len(set(keys.values())) == len(keys) == len(names)
    assert all(key.isascii() and set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-") for key in keys.values())
    assert keys["a.tfrecord-00000-of-00001"] == "a-00000-of-00001-000000-00000"
    (tmp_path / names[0]).unlink()
    assert {one.meta["provenance"]["file"]: one.key for one in read(tmp_path)[0]} == {name: keys[name] for name in names[1:]}


def test_mistakes_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    path = write(tmp_path / "bad", [episode(0)])
    path.write_bytes(path.read_bytes()[:-9])
    write(tmp_path / "good", [episode(0), episode(1)])
    write(tmp_path / "odd", [episode(0)], features="[1, 2]")
    for name in ("1.0.0", "1.1.0"):
        write(tmp_path / "two" / name, [episode(0)])
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("none", {}, "no TFRecord files"),
        ("bad", {}, r"no usable episode in 1 files \(1 damaged record\)"),
        ("odd", {}, "features.json is no features.json of TFDS"),
        ("two", {}, "describe different datasets"),
        ("good", {"camera": "side"}, "no camera side; there are image"),
        ("good", {"fps": 0.0}, "fps 0"),
        ("good", {"fps": float("nan")}, "fps nan"),
        ("good", {"resolution": 8}, "resolution 8"),
    ]
    for name, options, says in cases:
        with pytest.raises(UserError, match=says) as caught:
            opened(tmp_path / name, **options)
        assert len(str(caught.value).splitlines()) == 1


def test_object_storage_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bucket" / "toy" / "1.0.0", [episode(number) for number in range(4)])
    data = bytearray(path.read_bytes())
    data[3] ^= 1  # the search for the next record reads from there too
    path.write_bytes(data)
    expected, left = read(tmp_path / "bucket" / "toy")
    with serve(tmp_path) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        found, skipped = read("s3://bucket/toy")
    assert len(found) == 3
    assert contents(found) == contents(expected)
    assert skipped == left


def test_real_bridge_episodes() -> None:
    source = real_videos()
    if not (source / "bridge_rlds_train.tfrecord").is_file():
        pytest.skip(f"no bridge_rlds_train.tfrecord in {source}")
    found, skipped = read(source, rules=CutRules())
    assert (len(found), len({one.key for one in found}), skipped) == (25, 25, [])
    for one in found:
        assert one.video.shape == (10, 64, 64, 3)
        assert one.actions is not None
        assert one.state is not None
        assert (one.actions.shape, one.state.shape, one.fps, one.meta["camera"]) == ((9, 7), (10, 7), 5.0, "image_0")
        assert one.video.std() > 5, "pictures, not blanks"
    # What the arm was told is what it did next: row t belongs between the states t and t + 1.
    told = np.concatenate([one.actions[:, :3] for one in found if one.actions is not None])
    did = np.concatenate([np.diff(one.state[:, :3], axis=0) for one in found if one.state is not None])
    assert np.corrcoef(told.ravel(), did.ravel())[0, 1] > 0.5
    with pytest.raises(UserError, match="25 black camera"):
        opened(source, camera="image_3")
