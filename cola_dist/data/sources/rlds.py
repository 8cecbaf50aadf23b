"""Robot episodes in RLDS, as Open X-Embodiment publishes them: TFRecord files of ``tf.train.Example`` and a ``features.json`` beside them.

Each record is an episode. The nested dataset ``steps`` is flattened, so that ``steps/action`` holds the actions of all steps one after another.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.sources import Item, Skipped, SourceEpisode, Unusable, key_of
from cola_dist.data.sources.cut import CutRules, Recording, cut
from cola_dist.data.sources.pictures import decode_pictures, picture_format
from cola_dist.data.sources.tfrecord import Record, Values, read_records
from cola_dist.errors import UserError

BLACK = 16
"""A camera whose brightest value over an episode is not above this shows nothing."""
STATES = ("state", "proprio", "robot_state", "robot_obs")
"""Names below ``steps/observation``; the first that exists is the state."""
TASKS = ("steps/language_instruction", "steps/observation/natural_language_instruction", "language_instruction")
EMBODIMENTS = ("episode_metadata/embodiment", "episode_metadata/robot_type", "episode_metadata/robot")
"""Features that say what to do, and which robot it is (few datasets do); the first with a text counts."""
_FILE = re.compile(r"\.tfrecord(-\d+-of-\d+)?(\.gz)?$")
_TFDS_NAME = re.compile(r"(?P<dataset>.+)-(?P<split>[^-]+)\.tfrecord-\d+-of-\d+(\.gz)?")
_SPEAKING = re.compile(r"[A-Za-z0-9_-]+\.tfrecord-\d+-of-\d+")
"""Names that make keys as they are."""


@dataclass(frozen=True)
class Layout:
    """What the features are: cameras by the name that a user gives, the parts of the action and of the state, values per step where known."""

    cameras: Mapping[str, str]
    actions: Sequence[str]
    state: Sequence[str]
    widths: Mapping[str, int]

    @staticmethod
    def of(images: Iterable[str], widths: Mapping[str, int]) -> Layout:
        """From the names of all pictures, and of all numbers with their values per step, 0 where they are not known."""
        steps = sorted(name for name in images if name.startswith("steps/"))
        cameras = {name.removeprefix("steps/").removeprefix("observation/"): name for name in steps}
        states = (_parts(widths, f"steps/observation/{name}") for name in STATES)
        state = next((parts for parts in states if parts), [])
        return Layout(cameras, _parts(widths, "steps/action"), state, {name: width for name, width in widths.items() if width})

    @staticmethod
    def from_json(text: bytes) -> Layout:
        """From TFDS's ``features.json``. Raises ValueError, KeyError, TypeError or AttributeError when it is none."""
        images: list[str] = []
        widths: dict[str, int] = {}
        pending: list[tuple[str, Any]] = [("", storage.json_of(text))]
        while pending:
            name, leaf = pending.pop()
            about = leaf.get("image") or leaf.get("tensor") or {}
            shape = [max(0, int(side)) for side in about.get("shape", {}).get("dimensions", [])]  # -1 where it varies
            if "featuresDict" in leaf:
                pending += [(f"{name}/{part}".strip("/"), inner) for part, inner in leaf["featuresDict"]["features"].items()]
            elif "sequence" in leaf:
                pending.append((name, leaf["sequence"]["feature"]))
            elif "image" in leaf and about.get("dtype", "uint8") == "uint8" and shape[-1:] != [1]:  # depth maps have one channel
                images.append(name)
            elif "tensor" in leaf and about["dtype"] != "string" and about.get("encoding", "none") == "none":
                widths[name] = math.prod(shape)
        return Layout.of(images, widths)

    @staticmethod
    def from_episode(values: Mapping[str, Values]) -> Layout:
        """From an episode's own values, where there is no ``features.json``."""
        lists = {name: items for name, items in values.items() if isinstance(items, list)}
        images = [name for name, items in lists.items() if items and all(map(picture_format, items)) and "depth" not in name]
        steps = max((len(lists[name]) for name in images), default=0)
        numbers = {name: len(items) for name, items in values.items() if name not in lists}
        return Layout.of(images, {name: count // steps if steps and not count % steps else 0 for name, count in numbers.items()})


def _parts(names: Iterable[str], whole: str) -> list[str]:
    return sorted(name for name in names if name == whole or name.startswith(f"{whole}/"))


def _text(values: Mapping[str, Values], names: Sequence[str]) -> str:
    """The first text that is not empty under any of the names."""
    texts = (items for items in (values.get(name) for name in names) if isinstance(items, list))
    return next((text.decode(errors="replace") for items in texts for text in items if text), "")


class RldsOrigin:
    """The episodes of the one RLDS dataset below ``input`` (local or object storage), a file at a time; ``resolution`` bounds the short side.

    ``camera`` is a name below ``steps/observation``, such as "image_0"; by default the first, in sorted order, that shows something (neither
    black nor one still picture) in the first episode where any does. ``fps`` is taken as it is: RLDS does not say it. An episode whose
    actions do not match its frames, or are not finite, keeps its video without actions, because latent actions need none; its state likewise.

    Here only as many records are read as tell the camera. Raises UserError when there is no usable episode or no such camera.
    """

    domain = "robot"

    def __init__(
        self, input: str, source: str, resolution: int, rules: CutRules, camera: str = "", fps: float = 5.0, licence: str = ""
    ) -> None:
        if resolution < 16 or not 0 < fps <= 240:
            raise UserError(f"resolution {resolution}, fps {fps:g}: give at least 16 pixels, and a rate above 0 and at most 240")
        self.source, self.camera = source, camera
        self._input, self._resolution, self._rules, self._fps = input, resolution, rules, fps
        self._licence = licence or "as the original dataset"
        names = storage.list_files(input)
        self._items = tuple(Item(name, size) for name, size in names.items() if _FILE.search(name))
        if not self._items:
            raise UserError(f"{input}: no TFRecord files (*.tfrecord or *.tfrecord-00000-of-00010); give the folder of one RLDS dataset")
        self._layout = self._read_features(names)
        self._look()

    def items(self) -> Sequence[Item]:
        return self._items

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        """Segments of each record of a file; the file is read once, in pieces."""
        record = None
        for record in read_records(storage.join(self._input, item.name)):
            recording = self._recording(item.name, record)
            if isinstance(recording, Skipped):
                yield recording
            else:
                yield from cut(recording, self._rules)
        if record is None:
            yield Skipped(item.name, "empty file")

    def _read_features(self, names: Iterable[str]) -> Layout:
        """The layout as the file beside the records tells it; an empty one when there is no such file."""
        folders = {PurePosixPath("."), *(PurePosixPath(item.name).parent for item in self._items)}
        found = [name for name in names if PurePosixPath(name).match("*features*.json") and PurePosixPath(name).parent in folders]
        if len(found) > 1:
            raise UserError(f"{self._input}: {found[0]} and {found[1]} describe different datasets; give the folder of one")
        text = storage.read_bytes(storage.join(self._input, found[0])) if found else b"{}"
        try:
            return Layout.from_json(text)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{self._input}: {found[0]} is no features.json of TFDS; copy it again, or delete it to do without") from error

    def _look(self) -> None:
        """Read on until an episode is usable; it tells the layout and the camera where nothing else does."""
        reasons: Counter[str] = Counter()
        for item in self._items:
            for record in read_records(storage.join(self._input, item.name)):
                layout = self._layout if self._layout.cameras else Layout.from_episode(record.values)
                if self.camera and layout.cameras and self.camera not in layout.cameras:
                    raise UserError(f"{self._input}: no camera {self.camera}; there are {', '.join(layout.cameras)}")
                asked = [name for name in layout.cameras if not record.damage and self.camera in ("", name)]
                seen = {name: self._seen(record.values, layout.cameras[name]) for name in asked}
                shown = [name for name, reason in seen.items() if not reason]
                if shown:
                    self.camera, self._layout = shown[0], layout
                    return
                reasons[next(iter(seen.values()), "damaged record" if record.damage else "no video")] += 1
        found = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "all empty"
        raise UserError(f"{self._input}: no usable episode in {len(self._items)} files ({found}); copy them again or try another camera")

    def _seen(self, values: Mapping[str, Values], feature: str) -> str:
        """Why the pictures of a camera show nothing; empty, mostly after the second of them, where they do."""
        images = values.get(feature)
        if not isinstance(images, list) or not images or not all(map(picture_format, images)):
            return "no video"
        first: NDArray[np.uint8] | None = None
        bright = moving = False
        try:
            for picture in decode_pictures(images, self._resolution):
                first = picture if first is None else first
                bright = bright or bool(picture.max() > BLACK)
                moving = moving or not np.array_equal(picture, first)
                if bright and moving:
                    return ""
        except Unusable as error:
            return str(error)
        return "static camera" if bright else "black camera"

    def _recording(self, file: str, record: Record) -> Recording | Skipped:
        name = f"{file}#{record.number}"
        if record.damage:
            return Skipped(f"{name} at byte {record.at}: {record.damage}", "damaged record")
        feature = self._layout.cameras[self.camera]
        if reason := self._seen(record.values, feature):
            return Skipped(name, reason)
        images = record.values[feature]
        actions, no_actions = self._rows(record.values, self._layout.actions, len(images), len(images) - 1)
        state, no_state = self._rows(record.values, self._layout.state, len(images), len(images))
        lost = [f"{what} ({why})" for what, why in (("actions", no_actions), ("state", no_state)) if why]
        stem = file.replace(".tfrecord", "") if _SPEAKING.fullmatch(file) else key_of(file)
        return Recording(
            name=name,
            key=f"{stem}-{record.number:06d}",
            group=name,
            fps=self._fps,
            frames=((number / self._fps, picture) for number, picture in enumerate(decode_pictures(images, self._resolution))),
            meta=self._meta(file, record, actions is not None, state is not None),
            split=_split(file),
            actions=actions,
            state=state,
            note=f"without {' and '.join(lost)}" if lost else "",
        )

    def _rows(self, values: Mapping[str, Values], names: Sequence[str], steps: int, kept: int) -> tuple[NDArray[np.float32] | None, str]:
        """The parts side by side, float32 ``[kept, A]``, or none and why."""
        parts = []
        for name in names:
            numbers = values.get(name, [])
            width = self._layout.widths.get(name, len(numbers) // steps)
            if isinstance(numbers, list) or not width or len(numbers) != steps * width:
                return None, "not one row per frame"
            parts.append(numbers.reshape(steps, -1)[:kept].astype(np.float32))
        rows = np.concatenate(parts, axis=1) if parts else None
        return (None, "not finite") if rows is not None and not np.isfinite(rows).all() else (rows, "")

    def _meta(self, file: str, record: Record, actions: bool, state: bool) -> dict[str, Any]:
        base = PurePosixPath(file).name
        named = _TFDS_NAME.fullmatch(base)
        dataset = named["dataset"] if named else base.partition(".tfrecord")[0]
        return {
            "embodiment": _text(record.values, EMBODIMENTS) or "unknown",
            "camera": self.camera,
            "task": _text(record.values, TASKS),
            "action": _listed(self._layout.actions) if actions else "",
            "state": _listed(self._layout.state) if state else "",
            "licence": self._licence,
            "provenance": {"dataset": dataset, "file": file, "record": record.number},
        }


def _split(file: str) -> Literal["", "train", "heldout"]:
    """Where TFDS's own split puts the episodes of a file; empty for others."""
    named = _TFDS_NAME.fullmatch(PurePosixPath(file).name)
    if named is None:
        return ""
    return "heldout" if re.match("val|test|eval", named["split"]) else "train" if named["split"] == "train" else ""


def _listed(features: Sequence[str]) -> str:
    return ", ".join(name.removeprefix("steps/") for name in features)
