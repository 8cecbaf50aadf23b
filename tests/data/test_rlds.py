"""RLDS episodes as TFDS writes them: exact values, counted damage, and what a user is told; the files are written here, byte by byte."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cola_dist.data.decode import decode_clip
from cola_dist.data.shards import ShardWriter, lint, open_folder
from cola_dist.data.sources import SourceEpisode, write_source
from cola_dist.data.sources.rlds import MIN_FRAMES, RldsFolder, Values, decode_pictures, masked_crc32c, parse_example
from cola_dist.errors import UserError
from tests.data.videos import moving_square, real_videos
from tests.s3 import serve

STEPS = 6
SIZES = [((48, 64), 24, (24, 32)), ((48, 64), 100, (48, 64)), ((33, 51), 64, (32, 50)), ((90, 60), 31, (46, 30))]
FILE = "toy-train.tfrecord-00000-of-00001"


def masked(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def checksum(data: bytes) -> int:
    """The plain algorithm, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return masked(crc ^ 0xFFFFFFFF)


def varint(value: int) -> bytes:
    low, rest = value & 0x7F, value >> 7
    return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])


def field(number: int, data: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(data)) + data


def encode_example(features: Mapping[str, Values], packed: bool = True) -> bytes:
    entries = b""
    for name, values in features.items():
        if isinstance(values, list):
            feature = field(1, b"".join(field(1, value) for value in values))
        elif values.dtype == np.float32:
            parts = [value.tobytes() for value in values]
            feature = field(2, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3 | 5) + part for part in parts))
        else:
            parts = [varint(int(value) & (2**64 - 1)) for value in values]
            feature = field(3, field(1, b"".join(parts)) if packed else b"".join(varint(1 << 3) + part for part in parts))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def framed(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + struct.pack("<I", checksum(length)) + data + struct.pack("<I", checksum(data))


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
    path.write_bytes(b"".join(framed(encode_example(one)) for one in episodes))
    if features:
        (path.parent / "features.json").write_text(features)
    return path


def read(folder: Path, **options: Any) -> tuple[RldsFolder, list[SourceEpisode]]:
    rlds = RldsFolder(str(folder), 64, 0.25, **options)
    return rlds, list(rlds.episodes())


def contents(episodes: Sequence[SourceEpisode]) -> list[tuple[Any, ...]]:
    """All that they hold, in a form that compares."""
    arrays = [[rows if rows is None else rows.tobytes() for rows in (one.video, one.actions, one.state)] for one in episodes]
    return [(one.key, one.split, one.fps, one.meta, *rows) for one, rows in zip(episodes, arrays, strict=True)]


def test_checksum_has_the_published_values() -> None:
    # RFC 3720, section B.4, and the check value of the CRC catalogues.
    assert masked_crc32c(bytes(32)) == masked(0x8A9136AA)
    assert masked_crc32c(b"\xff" * 32) == masked(0x62A8AB43)
    assert masked_crc32c(bytes(range(32))) == masked(0x46DD794E)
    assert masked_crc32c(b"123456789") == masked(0xE3069283)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_checksum_of_any_length(data: bytes) -> None:
    assert masked_crc32c(data) == checksum(data)


VALUES = st.one_of(
    st.lists(st.binary(max_size=300), max_size=4),
    st.lists(st.integers(0, 2**32 - 1), max_size=9).map(lambda bits: np.array(bits, np.uint32).view(np.float32)),
    st.lists(st.integers(-(2**63), 2**63 - 1), max_size=9).map(lambda numbers: np.array(numbers, np.int64)),
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=8), VALUES, max_size=5), st.booleans())
def test_examples_come_back_bit_for_bit(features: dict[str, Values], packed: bool) -> None:
    found = parse_example(encode_example(features, packed))
    assert found.keys() == features.keys()
    for name, values in features.items():
        got = found[name]
        if isinstance(values, list) or isinstance(got, list):
            assert got == values
        else:
            assert (got.dtype, got.tobytes()) == (values.dtype, values.tobytes())


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.binary(max_size=40).map(lambda data: field(1, field(1, data)))))
def test_other_bytes_are_a_value_error_or_an_example(data: bytes) -> None:
    with suppress(ValueError):
        assert isinstance(parse_example(data), dict)


def test_values_come_back_exactly(tmp_path: Path) -> None:
    write(tmp_path, [episode(number) for number in range(4)])
    rlds, found = read(tmp_path, fps=7.5)
    assert (rlds.camera, rlds.segments, rlds.outcomes, rlds.damage) == ("image", 4, {"packed": 4}, [])
    for number, one in enumerate(found):
        made = episode(number)
        np.testing.assert_array_equal(one.video, moving_square(STEPS, 16, 24, seed=number))
        assert one.actions is not None
        assert one.state is not None
        assert one.actions.dtype == one.state.dtype == np.float32
        np.testing.assert_array_equal(one.actions, np.reshape(made["steps/action"], (STEPS, 3))[:-1])
        np.testing.assert_array_equal(one.state, np.reshape(made["steps/observation/state"], (STEPS, 2)))
        assert (one.key, one.fps) == (f"toy-train-00000-of-00001-{number:06d}", 7.5)
        origin = {"dataset": "toy", "file": FILE, "record": number}
        assert one.meta == {"task": f"Öffne {number}", "camera": "image", "licence": "as the original dataset", "provenance": origin}
    assert sorted(one.split for one in found) == ["heldout", "train", "train", "train"]
    assert contents(found) == contents(read(tmp_path, fps=7.5)[1])
    (tmp_path / "features.json").unlink()
    assert contents(found) == contents(read(tmp_path, fps=7.5)[1]), "the records alone tell as much"


@pytest.mark.parametrize("described", [True, False])
def test_a_dict_of_action_parts_is_joined_in_sorted_order(tmp_path: Path, described: bool) -> None:
    world, gripper = np.arange(STEPS * 3, dtype=np.float32), 100 + np.arange(STEPS, dtype=np.int64)
    action = {"featuresDict": {"features": {"world": tensor("float32", 3), "gripper": tensor("int32")}}}
    features = features_json({"image": picture()}, action) if described else ""
    write(tmp_path, [episode(0, {"action": None, "action/world": world, "action/gripper": gripper})], features=features)
    actions = read(tmp_path)[1][0].actions
    assert actions is not None
    np.testing.assert_array_equal(actions, [[100 + t, 3 * t, 3 * t + 1, 3 * t + 2] for t in range(STEPS - 1)])


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
    rlds, found = read(tmp_path)
    assert "".join("A" * (one.actions is not None) + "S" * (one.state is not None) + " " for one in found) == "S S S AS A  "
    assert rlds.outcomes == {
        "packed": 1,
        "packed without actions (not finite)": 1,
        "packed without actions (not one row per frame)": 2,
        "packed without state (not finite)": 1,
        "packed without actions (not finite) and state (not finite)": 1,
    }


def test_episodes_without_a_moving_picture_are_counted(tmp_path: Path) -> None:
    video = moving_square(STEPS, 16, 24)
    broken = pictures(video)
    broken[2] = broken[2][:60]
    episodes = [
        episode(0, {"observation/image": pictures(np.zeros_like(video))}),
        episode(1, {"observation/image": pictures(np.repeat(video[:1], STEPS, 0))}),
        episode(2, {"observation/image": None}),
        episode(3, {"observation/image": [b""] * STEPS}),
        episode(4, steps=MIN_FRAMES - 1),
        episode(5),
        episode(6, {"observation/image": broken}),
        episode(7),
    ]
    path = write(tmp_path, episodes)
    path.write_bytes(path.read_bytes() + framed(b"\xff\xff no example"))
    rlds, found = read(tmp_path)
    assert [one.meta["provenance"]["record"] for one in found] == [5, 7]
    counts = {"black camera": 1, "static camera": 1, "no video": 2, f"shorter than {MIN_FRAMES} frames": 1, "damaged pictures": 1}
    assert rlds.outcomes == {**counts, "damaged record": 1, "packed": 2}
    assert [line.split(" at byte ")[0] for line in rlds.damage] == [f"{FILE}: record 6", f"{FILE}: record 8"]


@pytest.mark.parametrize("codec", ["png", "mjpeg"])
@pytest.mark.parametrize(("size", "resolution", "expected"), SIZES)
def test_scaled_down_to_even_sides_and_never_up(codec: str, size: tuple[int, int], resolution: int, expected: tuple[int, int]) -> None:
    video = moving_square(3, *size)
    small = decode_pictures(pictures(video, codec), resolution)
    assert small.shape == (3, *expected, 3)
    assert np.abs(small.mean((0, 1, 2)) - video.mean((0, 1, 2))).max() < 3, "colours stay"


@pytest.mark.parametrize("described", [True, False])
def test_the_first_camera_that_shows_something(tmp_path: Path, described: bool) -> None:
    still = np.zeros((STEPS, 16, 24, 3), np.uint8)
    cameras = {"a_depth": still + 90, "b": still, "c": moving_square(STEPS, 16, 24)}
    images: dict[str, Values | None] = {f"observation/{name}": pictures(video) for name, video in cameras.items()}
    features = features_json({"a_depth": picture(1, "uint16"), "b": picture(), "c": picture()}, tensor("float32", 3))
    write(tmp_path, [episode(0, {"observation/image": None} | images)], features=features if described else "")
    rlds, (one,) = read(tmp_path)
    assert (rlds.camera, one.meta["camera"], rlds.outcomes) == ("c", "c", {"packed": 1})
    assert contents([one]) == contents(read(tmp_path, camera="c")[1])
    with pytest.raises(UserError, match=r"no camera wrist; there are b, c$"):
        read(tmp_path, camera="wrist")
    with pytest.raises(UserError, match=r"no usable episode in 1 files \(1 black camera\)"):
        read(tmp_path, camera="b")


@pytest.mark.parametrize("place", [0, 6, 9, 12, 500, -1])
def test_a_flipped_byte_costs_one_record(tmp_path: Path, place: int) -> None:
    episodes = [episode(number) for number in range(5)]
    path = write(tmp_path, episodes)
    whole = read(tmp_path)[1]
    records = [framed(encode_example(one)) for one in episodes]
    for damaged in (0, 2, 4):
        start = len(b"".join(records[:damaged]))
        data = bytearray(b"".join(records))
        data[start + place % len(records[damaged])] ^= 0x10
        path.write_bytes(data)
        rlds, found = read(tmp_path)
        kept = whole[:damaged] + whole[damaged + 1 :]
        assert [one.key for one in found] == [one.key for one in kept]
        assert all(np.array_equal(one.video, other.video) for one, other in zip(found, kept, strict=True))
        assert rlds.outcomes == {"packed": 4, "damaged record": 1}
        (line,) = rlds.damage
        what = "its header is damaged" if 0 <= place < 12 else "the checksum of its data differs"
        assert line.startswith(f"{FILE}: record {damaged} at byte {start}: {what}")


def test_truncated_empty_and_foreign_files_do_not_stop_the_others(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, [episode(0)], "a.tfrecord")
    cut = write(tmp_path, [episode(number) for number in (1, 2, 3)], "b.tfrecord")
    cut.write_bytes(cut.read_bytes()[:-100])
    (tmp_path / "c.tfrecord").write_bytes(b"")
    (tmp_path / "d.tfrecord").write_bytes(b"this is no TFRecord at all\n" * 50)
    stub = write(tmp_path, [episode(4)], "e.tfrecord")
    stub.write_bytes(stub.read_bytes() + b"\x07\x00")
    rlds, found = read(tmp_path)
    assert [one.key for one in found] == ["a-000000", "b-000000", "b-000001", "e-000000"]
    assert rlds.outcomes == {"packed": 4, "damaged record": 3, "empty file": 1}
    assert [line.split(".tfrecord: record ")[0] + line.split()[2] for line in rlds.damage] == ["b2", "c0", "d0", "e1"]
    assert "100 bytes too early" in rlds.damage[0]
    assert [record.getMessage() for record in caplog.records] == rlds.damage


def test_keys_are_unique_and_safe(tmp_path: Path) -> None:
    for name in ("a b.tfrecord", "a-b.tfrecord", "deep/a b.tfrecord", "ä.tfrecord"):
        write(tmp_path, [episode(0)], name, features="")
    assert [one.key for one in read(tmp_path)[1]] == ["a-b-000000", "a-b-v2-000000", "deep-a-b-000000", "rlds-000000"]


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
            RldsFolder(str(tmp_path / name), **({"resolution": 64, "heldout_share": 0.5} | options))
        assert len(str(caught.value).splitlines()) == 1


def test_object_storage_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "bucket" / "toy" / "1.0.0", [episode(number) for number in range(4)])
    data = bytearray(path.read_bytes())
    data[3] ^= 1  # the search for the next record reads from there too
    path.write_bytes(data)
    local, expected = read(tmp_path / "bucket" / "toy")
    with serve(tmp_path) as s3:
        for name, value in s3.environment.items():
            monkeypatch.setenv(name, value)
        rlds = RldsFolder("s3://bucket/toy", 64, 0.25)
        found = list(rlds.episodes())
    assert len(found) == 3
    assert contents(found) == contents(expected)
    assert (rlds.outcomes, rlds.damage) == (local.outcomes, local.damage)


def test_real_bridge_episodes_become_sound_shards(tmp_path: Path) -> None:
    source = real_videos()
    if not (source / "bridge_rlds_train.tfrecord").is_file():
        pytest.skip(f"no bridge_rlds_train.tfrecord in {source}")
    rlds = RldsFolder(str(source), 64, 0.1)
    with ShardWriter(str(tmp_path / "out"), "bridge", "robot") as writer:
        write_source(writer, rlds.episodes(), crf=23)
        writer.close()
    assert (rlds.camera, rlds.segments, rlds.outcomes, rlds.damage) == ("image_0", 25, {"packed": 25}, [])
    opened = open_folder(str(tmp_path / "out"))
    assert lint(opened.uri) == []
    assert (len(opened.episodes), len(opened.split("heldout"))) == (25, 2)
    samples = list(webdataset.WebDataset([f"{opened.uri}/{shard}" for shard in opened.shards], shardshuffle=False))
    assert [sample["__key__"] for sample in samples] == [one.key for one in opened.episodes]
    for sample in samples:
        actions, state = (np.load(io.BytesIO(sample[f"{name}.npy"])) for name in ("actions", "state"))
        assert (actions.shape, state.shape, actions.dtype) == ((9, 7), (10, 7), np.float32)
        assert decode_clip(sample["mp4"], 5, 5, 1, 32, None).std() > 5, "pictures, not blanks"
        about = json.loads(sample["json"])
        assert (about["width"], about["height"], about["camera"]) == (64, 64, "image_0")
    # What the arm was told is what it did next: row t belongs between the states t and t + 1.
    rows = [(one.actions, one.state) for one in rlds.episodes() if one.actions is not None and one.state is not None]
    told = np.concatenate([actions[:, :3] for actions, _ in rows])
    did = np.concatenate([np.diff(state[:, :3], axis=0) for _, state in rows])
    assert np.corrcoef(told.ravel(), did.ravel())[0, 1] > 0.5
    with pytest.raises(UserError, match="25 black camera"):
        RldsFolder(str(source), 64, 0.1, camera="image_3")
