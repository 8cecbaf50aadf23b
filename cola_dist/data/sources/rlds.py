"""Robot episodes in RLDS, as Open X-Embodiment publishes them: TFRecord files of ``tf.train.Example`` and a ``features.json`` beside them.

Neither TensorFlow nor protobuf is needed: of both formats only the little that TFDS writes is read here. A TFRecord is the length (uint64), its
masked CRC-32C, the data, their masked CRC-32C, all little endian. An Example maps names to lists of bytes, floats or integers; the nested dataset
``steps`` is flattened, so that ``steps/action`` holds the actions of all steps one after another.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.sources import SourceEpisode, held_out
from cola_dist.errors import UserError

MIN_FRAMES = 5
"""A shorter episode is skipped: it holds no clip of the usual length."""
BLACK = 16
"""A camera whose brightest value over an episode is not above this shows nothing."""
PIECE = 4 * 1024**2
"""Bytes that one read asks for when the next record has to be searched; otherwise a read is one record."""
STATES = ("state", "proprio", "robot_state", "robot_obs")
"""Names below ``steps/observation``; the first that exists is the state."""
TASKS = ("steps/language_instruction", "steps/observation/natural_language_instruction", "language_instruction")
EMBODIMENTS = ("episode_metadata/embodiment", "episode_metadata/robot_type", "episode_metadata/robot")
"""Features that say what to do, and which robot it is (few datasets do); the first with a text counts."""
_FILE = re.compile(r"\.tfrecord(-\d+-of-\d+)?$")
_HEADER, _FOOTER = 12, 4
_DECODERS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}
_ONES = (0x641F6454).to_bytes(4, "little")
_log = logging.getLogger("cola_dist.data")

Values = list[bytes] | NDArray[np.float32] | NDArray[np.int64]


@functools.cache
def _crc_tables(level: int) -> NDArray[np.uint32]:
    """What ``4 * 2 ** level`` zero bytes make of a CRC register: uint32 ``[2, 65536]``, one row for each of its halves."""
    if level:
        half = _crc_tables(level - 1)
        return np.stack([_advanced(half, half[0]), _advanced(half, half[1])])
    low = np.arange(65536, dtype=np.uint32)
    rows = np.stack([low, low << 16])
    for _ in range(32):
        rows = np.bitwise_xor(rows >> 1, (rows & 1) * np.uint32(0x82F63B78))
    return rows


def _advanced(tables: NDArray[np.uint32], registers: NDArray[np.uint32]) -> NDArray[np.uint32]:
    halves = np.ascontiguousarray(registers).view(np.uint16)
    moved: NDArray[np.uint32] = tables[0].take(halves[0::2]) ^ tables[1].take(halves[1::2])
    return moved


def masked_crc32c(data: bytes | memoryview) -> int:
    """The CRC-32C (Castagnoli) of ``data`` as TFRecord stores it: rotated right by 15 bits, plus a constant.

    A CRC is linear: neighbouring words are joined in pairs, then pairs in pairs, which numpy does for all of them at once.
    """
    # Leading zeros leave an empty register empty; the first word after them fills it with ones, as the standard begins.
    words = np.frombuffer(bytes(-len(data) % 4) + _ONES + data, np.uint32)
    level = 0
    while len(words) > 1:
        if len(words) % 2:
            words = np.concatenate([np.zeros(1, np.uint32), words])
        words = _advanced(_crc_tables(level), words[0::2]) ^ words[1::2]
        level += 1
    return int(_masked(~_advanced(_crc_tables(0), words))[0])


def _masked(crc: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return ((crc >> 15) | (crc << 17)) + np.uint32(0xA282EAD8)  # type: ignore[return-value]


def _varint(data: bytes | memoryview, at: int) -> tuple[int, int]:
    """A number of protobuf's variable length, and where it ends."""
    value = 0
    for place, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value & (2**64 - 1), at + place + 1
    raise ValueError("a number does not end")


def _fields(data: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Number and bytes of each field of a protobuf message; of one that is a bare number, the bytes that encode it."""
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        wire, end = tag & 7, at
        if wire == 0:
            end = _varint(data, at)[1]
        elif wire == 2:
            length, at = _varint(data, at)
            end = at + length
        elif wire in (1, 5):
            end = at + (8 if wire == 1 else 4)
        else:
            raise ValueError(f"wire type {wire}")
        if end > len(data):
            raise ValueError("a field is longer than its message")
        yield tag >> 3, data[at:end]
        at = end


def _values(kind: int, items: list[bytes]) -> Values:
    """What a feature holds, from the fields of its bytes_list (1), float_list (2) or int64_list (3)."""
    if kind == 1:
        return items
    if kind == 2:
        return np.frombuffer(b"".join(items), np.float32)
    data, numbers, at = b"".join(items), [], 0
    while at < len(data):
        number, at = _varint(data, at)
        numbers.append(number)
    return np.array(numbers, np.uint64).view(np.int64)


def parse_example(data: bytes | memoryview) -> dict[str, Values]:
    """A serialised ``tf.train.Example``: each feature's values by name, a list of bytes, float32 ``[n]`` or int64 ``[n]``.

    A feature without a list of any kind is left out. Raises ValueError when the bytes are no such message.
    """
    found: dict[str, Values] = {}
    for _, features in _fields(memoryview(data)):
        for _, entry in _fields(features):
            pair = dict(_fields(entry))
            name = bytes(pair.get(1, b"")).decode()
            for kind, values in _fields(memoryview(pair.get(2, b""))):
                found[name] = _values(kind, [bytes(item) for _, item in _fields(values)])
    return found


def _next_header(uri: str, start: int, size: int) -> int:
    """Where the next 12 bytes lie that are a length and its checksum; ``size`` when there are none."""
    tables = _crc_tables(0)
    for at in range(start, size - _HEADER + 1, PIECE - _HEADER + 1):
        window = np.frombuffer(storage.read_bytes(uri, at, PIECE), np.uint8)
        words = np.ascontiguousarray(np.lib.stride_tricks.sliding_window_view(window, 4)).view(np.uint32)[:, 0]
        crc = ~_advanced(tables, _advanced(tables, ~words[:-8]) ^ words[4:-4])
        places = np.flatnonzero(_masked(crc) == words[8:])
        if len(places):
            return at + int(places[0])
    return size


@dataclass(frozen=True)
class _Record:
    """One record: its file, its number and first byte there, the length of its data, and its episode's key."""

    file: str
    number: int
    at: int
    length: int
    key: str


class _Layout:
    """What the features are: cameras by the name that a user gives, the parts of the action and of the state, values per step of each."""

    def __init__(self, images: Iterable[str], numbers: Mapping[str, int]) -> None:
        """``numbers`` maps a feature to its values per step, 0 where they are not known."""
        steps = sorted(name for name in images if name.startswith("steps/"))
        self.cameras = {name.removeprefix("steps/").removeprefix("observation/"): name for name in steps}
        self.actions = _parts(numbers, "steps/action")
        states = (_parts(numbers, f"steps/observation/{name}") for name in STATES)
        self.state = next((parts for parts in states if parts), [])
        self.widths = {name: width for name, width in numbers.items() if width}

    @staticmethod
    def from_json(text: bytes) -> _Layout:
        """From TFDS's ``features.json``. Raises ValueError, KeyError, TypeError or AttributeError when it is none."""
        images: list[str] = []
        numbers: dict[str, int] = {}
        todo: list[tuple[str, Any]] = [("", json.loads(text))]
        while todo:
            name, leaf = todo.pop()
            about = leaf.get("image") or leaf.get("tensor") or {}
            shape = [max(0, int(side)) for side in about.get("shape", {}).get("dimensions", [])]  # -1 where it varies
            if "featuresDict" in leaf:
                todo += [(f"{name}/{part}".strip("/"), inner) for part, inner in leaf["featuresDict"]["features"].items()]
            elif "sequence" in leaf:
                todo.append((name, leaf["sequence"]["feature"]))
            elif "image" in leaf and about.get("dtype", "uint8") == "uint8" and shape[-1:] != [1]:  # depth maps have one channel
                images.append(name)
            elif "tensor" in leaf and about["dtype"] != "string" and about.get("encoding", "none") == "none":
                numbers[name] = math.prod(shape)
        return _Layout(images, numbers)

    @staticmethod
    def from_example(example: Mapping[str, Values]) -> _Layout:
        """From an episode's own values, where there is no ``features.json``."""
        lists = {name: values for name, values in example.items() if isinstance(values, list)}
        images = [name for name, values in lists.items() if values and all(map(_decoder, values)) and "depth" not in name]
        return _Layout(images, {name: 0 for name in example if name not in lists})


def _parts(names: Iterable[str], whole: str) -> list[str]:
    return sorted(name for name in names if name == whole or name.startswith(f"{whole}/"))


def _decoder(image: bytes) -> str:
    """FFmpeg's name of the picture's format; empty for others than JPEG and PNG."""
    return next((name for magic, name in _DECODERS.items() if image.startswith(magic)), "")


def _text(example: Mapping[str, Values], names: Sequence[str]) -> str:
    """The first text that is not empty under any of the names."""
    texts = (values for values in (example.get(name) for name in names) if isinstance(values, list))
    return next((text.decode(errors="replace") for values in texts for text in values if text), "")


def decode_pictures(images: Sequence[bytes], resolution: int) -> NDArray[np.uint8]:
    """JPEG or PNG pictures, all of one size, as uint8 ``[len(images), H, W, 3]``.

    Their short side is scaled down to ``resolution`` pixels where it is longer; both sides are even, as H.264 with subsampled colour needs.
    Raises ValueError or PyAV's FFmpegError.
    """
    reformatter = VideoReformatter()
    frames: list[NDArray[np.uint8]] = []
    for image in images:
        # A new decoder for each: a used one takes a PNG for the difference to the one before.
        codec: Any = av.CodecContext.create(_decoder(image), "r")
        codec.thread_count = 1  # with more, the picture comes out only with the next
        (frame,) = codec.decode(av.Packet(image))
        short = min(frame.width, frame.height)
        width, height = (2 * max(1, side * min(short, resolution) // (2 * short)) for side in (frame.width, frame.height))
        small = reformatter.reformat(frame, width=width, height=height, format="rgb24", interpolation="AREA", threads=1)
        frames.append(np.asarray(small.to_ndarray(), np.uint8))
    return np.stack(frames)


class RldsFolder:
    """The episodes of the one RLDS dataset below ``uri`` (local or object storage); short side of a frame at most ``resolution`` pixels.

    ``camera`` is a name below ``steps/observation``, such as "image_0"; by default the first, in sorted order, that shows something (neither
    black nor one still picture) in the first episode where any does. ``fps`` is stored as it is: RLDS does not say it.

    An episode whose actions do not match its frames, or are not finite, keeps its video without actions, because latent actions need none;
    its state likewise. ``segments`` is how many episodes to expect at most; ``outcomes`` counts them by what became of them while
    ``episodes`` runs; ``damage`` has a line for each damaged record (file, number, place, what), which is logged too. Raises UserError when
    there is no usable episode or no such camera.
    """

    def __init__(self, uri: str, resolution: int, heldout_share: float, camera: str = "", fps: float = 5.0) -> None:
        if resolution < 16 or not 0 < fps <= 240:
            raise UserError(f"resolution {resolution}, fps {fps:g}: give at least 16 pixels, and a rate above 0 and at most 240")
        self.uri, self.resolution, self.fps, self.camera = uri, resolution, fps, camera
        self.outcomes: Counter[str] = Counter()
        self.damage: list[str] = []
        self._stems: set[str] = set()
        names = storage.list_files(uri)
        self.files = {name: size for name, size in names.items() if _FILE.search(name)}
        if not self.files:
            raise UserError(f"{uri}: no TFRecord files (*.tfrecord or *.tfrecord-00000-of-00010); give the folder of one RLDS dataset")
        self._layout = self._read_features(names)
        self._records = [record for name, size in self.files.items() for record in self._scan(name, size)]
        self._begin()
        self.segments = len(self._records)
        self._heldout = held_out([record.key for record in self._records], heldout_share)

    def episodes(self) -> Iterator[SourceEpisode]:
        """Every usable episode, in the order of file names and records."""
        for record in self._records:
            example = self._example(record)
            video = "damaged record" if example is None else self._video(record, example, self.camera)
            if example is None or isinstance(video, str):
                self.outcomes[str(video)] += 1
                continue
            actions, no_actions = self._rows(example, self._layout.actions, len(video), len(video) - 1)
            state, no_state = self._rows(example, self._layout.state, len(video), len(video))
            split = "heldout" if record.key in self._heldout else "train"
            yield SourceEpisode(record.key, split, video, self.fps, self._meta(record, example), actions, state)
            lost = [f"{name} ({why})" for name, why in (("actions", no_actions), ("state", no_state)) if why]
            self.outcomes[f"packed without {' and '.join(lost)}" if lost else "packed"] += 1

    def _read_features(self, names: Iterable[str]) -> _Layout:
        """The layout as the file beside the records tells it; an empty one when there is no such file."""
        folders = {PurePosixPath("."), *(PurePosixPath(name).parent for name in self.files)}
        found = [name for name in names if PurePosixPath(name).match("*features*.json") and PurePosixPath(name).parent in folders]
        if len(found) > 1:
            raise UserError(f"{self.uri}: {found[0]} and {found[1]} describe different datasets; give the folder of one")
        text = storage.read_bytes(storage.join(self.uri, found[0])) if found else b"{}"
        try:
            return _Layout.from_json(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self.uri}: {found[0]} is no features.json of TFDS; copy it again, or delete it to do without") from error

    def _scan(self, file: str, size: int) -> Iterator[_Record]:
        """The records of a file by their headers alone; a damaged header costs the one record that it belongs to."""
        uri = storage.join(self.uri, file)
        stem = re.sub(r"[^A-Za-z0-9_-]+", "-", file.replace(".tfrecord", "")).strip("-") or "rlds"
        while stem in self._stems:
            stem += "-v2"
        self._stems.add(stem)
        if not size:
            self._note(_Record(file, 0, 0, 0, stem), "the file is empty", "empty file")
        at, number = 0, -1
        while at < size:
            number += 1
            header = storage.read_bytes(uri, at, _HEADER)
            length = int.from_bytes(header[:8], "little")
            record = _Record(file, number, at, length, f"{stem}-{number:06d}")
            if len(header) < _HEADER or masked_crc32c(header[:8]) != int.from_bytes(header[8:], "little"):
                self._note(record, "its header is damaged or cut off", "damaged record")
                at = _next_header(uri, at + 1, size)
                continue
            at += _HEADER + length + _FOOTER
            if at <= size:
                yield record
            else:
                self._note(record, f"the file ends {at - size} bytes too early", "damaged record")

    def _begin(self) -> None:
        """Find the first usable episode and, unless it was given, the camera that shows something there.

        The records before it are counted and dropped, so that no more than one record is read again.
        """
        for skipped, record in enumerate(self._records):
            example = self._example(record)
            self._layout = self._layout if self._layout.cameras else _Layout.from_example(example or {})
            cameras = self._layout.cameras
            if self.camera and cameras and self.camera not in cameras:
                raise UserError(f"{self.uri}: no camera {self.camera}; there are {', '.join(cameras)}")
            asked = [name for name in cameras if example is not None and self.camera in ("", name)]
            videos = {name: self._video(record, example or {}, name) for name in asked}
            shown = [name for name, video in videos.items() if not isinstance(video, str)]
            if shown:
                self.camera = shown[0]
                del self._records[:skipped]
                return
            self.outcomes[str(next(iter(videos.values()), "damaged record" if example is None else "no video"))] += 1
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(self.outcomes.items()))
        raise UserError(f"{self.uri}: no usable episode in {len(self.files)} files ({reasons}); copy them again or try another camera")

    def _example(self, record: _Record) -> dict[str, Values] | None:
        """The record's values, or none when it is damaged, which is noted."""
        data = memoryview(storage.read_bytes(storage.join(self.uri, record.file), record.at + _HEADER, record.length + _FOOTER))
        payload, checksum = data[: record.length], data[record.length :]
        try:
            if len(checksum) < _FOOTER or masked_crc32c(payload) != int.from_bytes(checksum, "little"):
                raise ValueError("the checksum of its data differs")
            return parse_example(payload)
        except ValueError as error:
            self._note(record, str(error))
            return None

    def _video(self, record: _Record, example: Mapping[str, Values], camera: str) -> NDArray[np.uint8] | str:
        """Frames uint8 ``[F, H, W, 3]``, or why there are none."""
        images = example.get(self._layout.cameras[camera])
        if not isinstance(images, list) or not images or not all(map(_decoder, images)):
            return "no video"
        if len(images) < MIN_FRAMES:
            return f"shorter than {MIN_FRAMES} frames"
        try:
            video = decode_pictures(images, self.resolution)
        except (av.FFmpegError, ValueError) as error:
            self._note(record, f"pictures of {camera} do not decode ({type(error).__name__})")
            return "damaged pictures"
        if video.max() <= BLACK:
            return "black camera"
        return "static camera" if (video == video[0]).all() else video

    def _rows(self, example: Mapping[str, Values], names: Sequence[str], steps: int, kept: int) -> tuple[NDArray[np.float32] | None, str]:
        """The parts side by side, float32 ``[kept, A]``, or none and why. Without features.json the first episode tells how wide each is."""
        parts = []
        for name in names:
            values = example.get(name, [])
            width = self._layout.widths.get(name, len(values) // steps)
            if isinstance(values, list) or not width or len(values) != steps * width:
                return None, "not one row per frame"
            self._layout.widths[name] = width
            parts.append(values.reshape(steps, -1)[:kept].astype(np.float32))
        rows = np.concatenate(parts, axis=1) if parts else None
        return (None, "not finite") if rows is not None and not np.isfinite(rows).all() else (rows, "")

    def _meta(self, record: _Record, example: Mapping[str, Values]) -> dict[str, Any]:
        dataset = re.split(r"-[^-]+\.tfrecord-|\.tfrecord", PurePosixPath(record.file).name)[0]  # TFDS: NAME-SPLIT.tfrecord-00000-of-00010
        origin = {"dataset": dataset, "file": record.file, "record": record.number}
        texts = {"task": _text(example, TASKS), "embodiment": _text(example, EMBODIMENTS), "camera": self.camera}
        return {name: text for name, text in texts.items() if text} | {"licence": "as the original dataset", "provenance": origin}

    def _note(self, record: _Record, what: str, outcome: str = "") -> None:
        self.damage.append(f"{record.file}: record {record.number} at byte {record.at}: {what}")
        _log.warning("%s", self.damage[-1])
        self.outcomes.update([outcome] if outcome else [])
