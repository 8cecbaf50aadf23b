"""Robot episodes in HDF5, laid out as by robomimic, LIBERO or ALOHA, and in npz files.

    robomimic, LIBERO  data/demo_0/obs/agentview_image, data/demo_0/actions, mask/valid; a file holds many episodes
    ALOHA              observations/images/cam_high, observations/qpos, action; a file is an episode
    npz                images, actions, state and the like; a file is an episode

What differs between them is seen from the code that writes them:
- robomimic records picture t, then applies action t, and turns robosuite's pictures, whose first row is the bottom, the right way up
  (github.com/ARISE-Initiative/robomimic, docs/datasets/overview.md, scripts/dataset_states_to_obs.py, envs/env_robosuite.py).
- LIBERO applies action t, then records picture t, leaves the first row at the bottom, and notes that: ``macros_image_convention`` is "opengl"
  (github.com/Lifelong-Robot-Learning/LIBERO, scripts/create_dataset.py; issue 11 shows such pictures). Rendered anew for OpenVLA, its files
  lack the note, keep the bottom row first, and have picture t before action t (github.com/openvla/openvla,
  experiments/robot/libero/regenerate_libero_dataset.py).
- ALOHA records picture t, then applies action t (github.com/tonyzhaozh/act, record_sim_episodes.py). Mobile ALOHA compresses pictures to JPEG,
  pads them with zeros, sets the attribute ``compress``, and gives RGB to OpenCV, which takes it for BGR: red and blue are exchanged
  (github.com/MarkFzp/mobile-aloha, aloha_scripts/record_episodes.py, and visualize_episodes.py, which exchanges them back). Rows are taken as
  recorded: that act's loader moves those of real robots by one step, for their latency, is not done here.

Where a file says nothing, pictures are the right way up, RGB, and action t follows picture t.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

from cola_dist import storage
from cola_dist.data.decode import small_picture
from cola_dist.data.sources import Item, Skipped, SourceEpisode, Unusable, key_of
from cola_dist.data.sources.cut import CutRules, Recording, cut
from cola_dist.data.sources.pictures import decode_pictures
from cola_dist.data.sources.robot_arrays import Array, arrays_in, attribute, group_in, names_in, open_hdf5, open_npz, reading
from cola_dist.errors import UserError

ENDINGS = (".hdf5", ".h5", ".npz")
ACTIONS = ("actions", "action")
STATES = (
    ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos"),
    ("joint_states", "gripper_states"),
    *((name,) for name in ("state", "states", "proprio", "qpos")),
)
"""The state is the parts of the first row of which one exists: robomimic's and LIBERO's own choice of inputs, then usual names."""
CAMERAS = ("images", "image", "rgb", "video", "frames", "observations")
"""Names that go before others, in this order."""
SMALLEST_SIDE = 16
"""Pixels; an array with shorter sides is no camera's."""
_ON_THE_HAND = re.compile(r"wrist|hand|gripper", re.IGNORECASE)
_NO_COLOUR = re.compile(r"depth|segment|mask|(^|_)seg(_|$)", re.IGNORECASE)
_LIBERO_CAMERAS = ("agentview_rgb", "eye_in_hand_rgb")
_WIDEST = 4096
_MOST_NUMBERS = 2**27
"""Of an episode's actions or states, or of names in a list, which are read as a whole: half a gigabyte."""
_MAX_FPS = 240.0
_LOOKED_AT = 8
"""Files that are searched for a camera's name at most; from object storage each is downloaded."""


@dataclass(frozen=True)
class _Episode:
    """What a file holds of one episode. ``cameras`` and ``values`` are arrays by name, one row for each frame as a rule."""

    cameras: Mapping[str, Array]
    values: Mapping[str, Array]
    fps: float | None = None
    embodiment: str = ""
    task: str = ""
    split: Literal["", "train", "heldout"] = ""
    bottom_first: frozenset[str] = frozenset()
    """Cameras whose first row of pixels is the bottom."""
    acted_before: bool = False
    """Frame t is what action t led to, not what it was applied to."""
    swapped: bool = False
    """Red and blue of JPEG pictures are exchanged."""


class _Layout(Protocol):
    @property
    def parts(self) -> Sequence[str]:
        """Names of the episodes; one empty name where the file is an episode."""

    def episode(self, part: str) -> _Episode:
        """Raises Unusable."""


class _Robomimic:
    def __init__(self, file: Any, data: Any) -> None:
        self.parts = names_in(data)
        self._data = data
        self._convention = attribute(data, "macros_image_convention")
        environment, problem = _json(attribute(data, "env_args")), _json(attribute(data, "problem_info"))
        robots = _inside(environment, "env_kwargs", "robots")
        self._embodiment = ", ".join(map(str, robots)) if isinstance(robots, list) else robots if isinstance(robots, str) else ""
        words = _inside(problem, "language_instruction")
        text = " ".join(map(str, words)) if isinstance(words, list) else words
        self._task = next((found.strip('" ') for found in (text, _inside(environment, "env_name")) if found and isinstance(found, str)), "")
        rate = _inside(environment, "env_kwargs", "control_freq")
        self._fps = float(rate) if isinstance(rate, int | float) and 0 < rate <= _MAX_FPS else None
        mask = group_in(file, "mask")
        filters = arrays_in(mask) if mask is not None else {}
        self._train, self._valid = (_texts(filters[name]) if name in filters else set() for name in ("train", "valid"))

    def episode(self, part: str) -> _Episode:
        """The demonstration of that name. Raises ``Unusable`` for one without observations."""
        demo = group_in(self._data, part)
        observations = group_in(demo, "obs") if demo is not None else None
        if observations is None:
            raise Unusable("no observations")
        arrays = arrays_in(observations)
        cameras = {name: array for name, array in arrays.items() if _is_camera(name, array)}
        # What lies beside the actions as "states" is the simulator's, with all objects.
        actions = {name: array for name, array in arrays_in(demo).items() if name in ACTIONS}
        turned = {name for name in cameras if self._convention == "opengl" or (not self._convention and name in _LIBERO_CAMERAS)}
        return _Episode(
            cameras,
            {**arrays, **actions},
            self._fps,
            self._embodiment,
            self._task,
            "heldout" if part in self._valid else "train" if part in self._train else "",
            frozenset(turned),
            acted_before=bool(self._convention),
        )


class _Aloha:
    parts = ("",)

    def __init__(self, file: Any, observations: Any) -> None:
        self._file, self._observations = file, observations

    def episode(self, part: str) -> _Episode:
        images = group_in(self._observations, "images")
        arrays = arrays_in(images) if images is not None else {}
        cameras = {name: array for name, array in arrays.items() if _is_camera(name, array) or _is_compressed(name, array)}
        values = {**arrays_in(self._observations), **arrays_in(self._file)}
        with reading():
            swapped = bool(self._file.attrs.get("compress", False))
        return _Episode(cameras, values, swapped=swapped)


class _Npz:
    parts = ("",)

    def __init__(self, arrays: Mapping[str, Array]) -> None:
        self._arrays = arrays

    def episode(self, part: str) -> _Episode:
        cameras = {name: array for name, array in self._arrays.items() if _is_camera(name, array)}
        if not cameras and any(array.dtype.hasobject for array in self._arrays.values()):
            raise Unusable("pickled arrays")
        return _Episode(cameras, self._arrays)


class RobotFilesOrigin:
    """The robot episodes in the HDF5 and npz files below ``input`` (local or object storage), seen by one camera; a file is an item.

    ``camera`` is a dataset's name, such as "agentview_image"; by default the first that is not on the hand, in each episode. Depth and
    segmentation are no cameras. ``fps`` is for files that do not say their rate (robosuite's ``control_freq`` does). Pictures are uint8, or
    floats from 0 to 1, with channels last or first; ``resolution`` bounds their short side. "valid" and "train" below ``mask`` fix the split.

    An episode whose actions have neither a row for each frame nor one less, or are not finite, keeps its video without them; its state
    likewise. Of as many actions as frames the one goes whose effect is not seen. Raises UserError when there are no such files, or the first
    that can be read does not have the camera.
    """

    domain = "robot"

    def __init__(
        self, input: str, source: str, resolution: int, rules: CutRules, camera: str = "", fps: float = 20.0, licence: str = ""
    ) -> None:
        if resolution < 16 or not 0 < fps <= _MAX_FPS:
            raise UserError(f"resolution {resolution}, fps {fps:g}: give at least 16 pixels, and a rate above 0 and at most {_MAX_FPS:g}")
        self.source, self.camera = source, camera
        self._input, self._resolution, self._rules, self._fps = input, resolution, rules, fps
        self._licence = licence or "as the original dataset"
        self._items = tuple(Item(name, size) for name, size in storage.list_files(input).items() if name.lower().endswith(ENDINGS))
        if not self._items:
            raise UserError(f"{input}: no robot files ({', '.join(ENDINGS)}); give the folder that holds them")
        if camera:
            self._look()

    def items(self) -> Sequence[Item]:
        return self._items

    def episodes(self, item: Item) -> Iterator[SourceEpisode | Skipped]:
        """Segments of each episode of a file. Pictures are read some at a time."""
        try:
            with self._opened(item.name) as layout:
                if not layout.parts:
                    yield Skipped(item.name, "no episodes")
                for part in layout.parts:
                    name = f"{item.name}#{part}" if part else item.name
                    try:
                        recording = self._recording(item.name, part, name, layout.episode(part))
                    except Unusable as error:
                        yield Skipped(name, str(error))
                    else:
                        yield from cut(recording, self._rules)
        except Unusable as error:
            yield Skipped(item.name, str(error))

    @contextmanager
    def _opened(self, name: str) -> Iterator[_Layout]:
        """A file, downloaded unless it is local. Raises Unusable, and OSError where storage fails."""
        uri = storage.join(self._input, name)
        with ExitStack() as stack:
            path = storage.local_path(uri)
            if path is None:
                path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "file")
                storage.download_file(uri, path)
            if not storage.read_bytes(str(path), 0, 1):
                raise Unusable("empty file")
            if name.lower().endswith(".npz"):
                yield _Npz(stack.enter_context(open_npz(path)))
                return
            file = stack.enter_context(open_hdf5(path))
            data, observations = group_in(file, "data"), group_in(file, "observations")
            if data is None and observations is None:
                raise Unusable("neither robomimic's layout nor ALOHA's")
            yield _Aloha(file, observations) if data is None else _Robomimic(file, data)

    def _look(self) -> None:
        for item in self._items[:_LOOKED_AT]:
            try:
                with self._opened(item.name) as layout:
                    cameras = layout.episode(layout.parts[0]).cameras if layout.parts else {}
            except Unusable:
                continue
            if cameras and self.camera not in cameras:
                raise UserError(f"{storage.join(self._input, item.name)}: no camera {self.camera}; there are {', '.join(cameras)}")
            if cameras:
                return

    def _recording(self, file: str, part: str, name: str, episode: _Episode) -> Recording:
        camera = self.camera or _first(episode.cameras)
        if camera not in episode.cameras:
            raise Unusable("no such camera" if self.camera else "no colour camera")
        count = episode.cameras[camera].shape[0]
        if count < 2:
            raise Unusable(f"shorter than {self._rules.min_seconds:g} s")
        action = [found for found in ACTIONS if found in episode.values][:1]
        parts = next((parts for parts in STATES if any(found in episode.values for found in parts)), ())
        states = [found for found in parts if found in episode.values]
        actions, no_actions = _rows(episode.values, action, (count, count - 1))
        if actions is not None and len(actions) == count:
            actions = actions[1:] if episode.acted_before else actions[:-1]
        state, no_state = _rows(episode.values, states, (count,))
        lost = [f"{what} ({why})" for what, why in (("actions", no_actions), ("state", no_state)) if why]
        fps = episode.fps or self._fps
        pictures = _pictures(episode, camera, self._resolution)
        return Recording(
            name=name,
            key="-".join([key_of(file), *([part if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", part) else key_of(part)] if part else [])]),
            group=name,
            fps=fps,
            frames=((number / fps, picture) for number, picture in enumerate(pictures)),
            meta={
                "embodiment": episode.embodiment or "unknown",
                "camera": camera,
                "task": episode.task,
                "action": ", ".join(action) if actions is not None else "",
                "state": ", ".join(states) if state is not None else "",
                "licence": self._licence,
                "provenance": {"dataset": storage.name(self._input), "file": file, "episode": part},
            },
            split=episode.split,
            actions=actions,
            state=state,
            note=f"without {' and '.join(lost)}" if lost else "",
        )


def _is_camera(name: str, array: Array) -> bool:
    """Whether the array has the shape of colour pictures, ``[T, H, W, 3]`` or ``[T, 3, H, W]``."""
    if len(array.shape) != 4 or array.dtype.kind not in "uif" or _NO_COLOUR.search(name):
        return False
    sides = array.shape[1:3] if array.shape[3] == 3 else array.shape[2:]
    return 3 in (array.shape[1], array.shape[3]) and min(sides) >= SMALLEST_SIDE


def _is_compressed(name: str, array: Array) -> bool:
    """Whether its rows may be files of pictures: bytes padded to one length, or of any length each."""
    padded = len(array.shape) == 2 and array.dtype == np.uint8
    return (padded or (len(array.shape) == 1 and array.dtype.kind in "OS")) and not _NO_COLOUR.search(name)


def _first(cameras: Mapping[str, Array]) -> str:
    def rank(name: str) -> tuple[bool, int, str]:
        return _ON_THE_HAND.search(name) is not None, CAMERAS.index(name) if name in CAMERAS else len(CAMERAS), name

    return min(cameras, key=rank, default="")


def _pictures(episode: _Episode, camera: str, resolution: int) -> Iterator[NDArray[np.uint8]]:
    """Frames of a camera, uint8 ``[H, W, 3]``, small and even-sided. Raises Unusable."""
    array = episode.cameras[camera]
    if len(array.shape) < 4:
        for picture in decode_pictures(_files(array), resolution):
            yield np.ascontiguousarray(picture[..., ::-1]) if episode.swapped else picture
        return
    reformatter = VideoReformatter()
    for block in array.blocks():
        pixels = _as_uint8(block)
        pixels = pixels if pixels.shape[3] == 3 else pixels.transpose(0, 2, 3, 1)
        for picture in pixels[:, ::-1] if camera in episode.bottom_first else pixels:
            yield small_picture(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"), resolution, reformatter)


def _files(array: Array) -> Iterator[bytes]:
    """The rows of compressed pictures; a decoder does not mind zeros after the end of one."""
    with reading():
        for block in array.blocks():
            for row in block:
                yield row if isinstance(row, bytes) else np.asarray(row, np.uint8).tobytes()


def _as_uint8(pixels: NDArray[Any]) -> NDArray[np.uint8]:
    if pixels.dtype == np.uint8:
        return np.asarray(pixels, np.uint8)
    if pixels.dtype.kind != "f" or not ((pixels >= 0) & (pixels <= 1)).all():
        raise Unusable("pictures neither uint8 nor from 0 to 1")
    return np.asarray(np.rint(pixels * 255), np.uint8)


def _rows(values: Mapping[str, Array], names: Sequence[str], lengths: tuple[int, ...]) -> tuple[NDArray[np.float32] | None, str]:
    """Arrays side by side, float32 ``[one of lengths, sum of their widths]``, or none and why; none too where there are no names."""
    parts = []
    for array in (values[name] for name in names):
        wide = math.prod(array.shape[1:])
        if array.dtype.kind not in "biuf" or not array.shape or array.shape[0] not in lengths or not 0 < wide <= _WIDEST:
            return None, "mismatched rows"
        if math.prod(array.shape) > _MOST_NUMBERS:  # which HDF5 may make up: what was never written it gives as zeros
            return None, "declared size beyond reason"
        try:
            with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite
                parts.append(np.concatenate([block.reshape(-1, wide).astype(np.float32) for block in array.blocks()]))
        except Unusable as error:
            return None, str(error)
    rows = np.concatenate(parts, axis=1) if parts else None
    return (None, "not finite") if rows is not None and not np.isfinite(rows).all() else (rows, "")


def _texts(array: Array) -> set[str]:
    """The names that a filter key lists."""
    sound = array.dtype.kind in "OS" and array.shape and math.prod(array.shape) * array.dtype.itemsize <= _MOST_NUMBERS
    rows = [row for block in array.blocks() for row in block.ravel().tolist()] if sound else []
    return {row.decode(errors="replace") if isinstance(row, bytes) else str(row) for row in rows}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _inside(value: Any, *names: str) -> Any:
    """What lies below these names in nested objects of JSON, or none."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value
