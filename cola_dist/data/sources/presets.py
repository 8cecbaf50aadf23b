"""Published data sets of videos: how their files lie, which tables come with them, and under what terms.

A preset is data; ``sources.video`` reads them all in the same way. Each says where its layout was looked up. Where the terms could not be looked
up, or differ within the data set, its licence says "as the original dataset".
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from cola_dist.data.sources.tables import Columns, Split
from cola_dist.errors import UserError

_UNKNOWN_LICENCE = "as the original dataset"
_UID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


@dataclass(frozen=True)
class Preset:
    """The layout of a published data set.

    ``files`` are regular expressions for names below the input, searched for, letters of either case; the first that finds any is used. Their
    group "group" is what is never torn between splits (without one, the file), their group "number" makes of numbered pictures one recording.
    """

    name: str
    title: str
    domain: str
    """"robot" or "human"; empty: the user says."""
    licence: str
    files: tuple[str, ...]
    fps: float = 0.0
    """Frames per second; 0: as each file says."""
    tables: tuple[tuple[str, Split], ...] = ()
    """Regular expressions for the names of tables, and the split of their rows. Without a table all files are taken whole."""
    columns: Columns | None = None


_PRESETS = (
    # Files, and names and keys of the lists ("id", "label", "template", "placeholders"; the test list has "id" alone): several public readers agree,
    # among them github.com/hephaex/deeplearning-note for the files. Both sets of names of the lists are in use. The owner's page (Qualcomm) could
    # not be read: terms unverified.
    Preset(
        name="something-something-v2",
        title="Something-Something V2",
        domain="human",
        licence=_UNKNOWN_LICENCE,
        files=(r"(?:^|/)\d+\.webm$",),
        tables=(
            (r"(?:^|/)(?:something-something-v2-)?train\.json$", "train"),
            (r"(?:^|/)(?:something-something-v2-)?validation\.json$", "heldout"),
            (r"(?:^|/)(?:something-something-v2-)?test\.json$", "heldout"),
        ),
        columns=Columns(file=("{id}.webm",), text="label", id="id"),
    ),
    # Folders: github.com/facebookresearch/Ego4d, ego4d/cli/README.md. Keys of ego4d.json: several public readers and a listing of its keys agree.
    # Videos are taken whole: narrations are points in time. Terms: the signed agreement at ego4ddataset.com.
    Preset(
        name="ego4d",
        title="Ego4D",
        domain="human",
        licence="Ego4D licence agreement",
        files=(rf"(?:^|/)video_540ss/{_UID}\.mp4$", rf"(?:^|/)full_scale/{_UID}\.mp4$", rf"(?:^|/){_UID}\.mp4$"),
        tables=((r"(?:^|/)ego4d\.json$", ""),),
        columns=Columns(
            file=("video_540ss/{video_uid}.mp4", "full_scale/{video_uid}.mp4", "{video_uid}.mp4"),
            text="scenarios",
            group="fb_participant_id",
            id="video_uid",
            rows="videos",
        ),
    ),
    # Columns, names and terms: github.com/epic-kitchens/epic-kitchens-100-annotations, README.md and license.txt. Folders: a public copy
    # (awsaf49/epic_kitchens_100), in line with the download scripts' folders for frames. Others work too, as names of videos are unique.
    Preset(
        name="epic-kitchens",
        title="EPIC-KITCHENS-100",
        domain="human",
        licence="CC BY-NC 4.0",
        files=(r"(?:^|/)(?P<group>P\d{2})_\d{2,3}\.mp4$",),
        tables=(
            (r"(?:^|/)EPIC_100_train\.csv$", "train"),
            (r"(?:^|/)EPIC_100_validation\.csv$", "heldout"),
            (r"(?:^|/)EPIC_100_test_timestamps\.csv$", "heldout"),
        ),
        columns=Columns(
            file=("{participant_id}/videos/{video_id}.MP4", "{video_id}.MP4"),
            start="start_timestamp",
            end="stop_timestamp",
            text="narration",
            group="participant_id",
            id="narration_id",
        ),
    ),
    # The owner's page (cbs.ic.gatech.edu/fpv) could not be read. Names of files, and the columns of raw_annotations/action_labels.csv (separated
    # by semicolons, its header begun with #): four public readers of the data set agree. Terms unverified.
    Preset(
        name="egtea-gaze-plus",
        title="EGTEA Gaze+",
        domain="human",
        licence=_UNKNOWN_LICENCE,
        files=(
            r"(?:^|/)(?P<group>O?P\d{2})-R\d{2}-[A-Za-z]+\.mp4$",
            r"(?:^|/)(?P<group>O?P\d{2})-R\d{2}-[A-Za-z]+-\d+-\d+-F\d+-F\d+\.mp4$",
        ),
        tables=((r"(?:^|/)action_labels\.csv$", ""),),
        columns=Columns(
            file=("{Video Session}.mp4",),
            start="Starting Time (ms)",
            end="Ending Time (ms)",
            unit="milliseconds",
            text="Action Label",
            id="Clip Prefix (Unique)",
        ),
    ),
    # github.com/ai4ce/EgoPAT3D, README.md. Recordings are whole; clip_ranges.txt beside each is not read, as its format is not described there.
    # Terms of the data unverified: the repository's licence is that of its code.
    Preset(
        name="egopat3d",
        title="EgoPAT3D",
        domain="human",
        licence=_UNKNOWN_LICENCE,
        files=(r"(?:^|/)(?P<group>[A-Za-z]+_\d+)/rgb_video\.mp4$",),
    ),
    # github.com/leolyliu/HOI4D-Instructions, README.md and release.txt; H is the person. Whole recordings; action/color.json is not read, as its
    # format is only outlined there. Terms of the data unverified: the repository's licence is that of its code.
    Preset(
        name="hoi4d",
        title="HOI4D",
        domain="human",
        licence=_UNKNOWN_LICENCE,
        files=(r"(?:^|/)ZY\d+/(?P<group>H\d+)/C\d+/N\d+/S\d+/s\d+/T\d+/align_rgb/image\.mp4$",),
    ),
    # Folders of sessions and terms: holoassist.github.io/data_links/README.md (also github.com/Ember-HoloAssist/holoassist-release). Names of the
    # videos: github.com/pyxploiter/HoloAssistViewer and other public readers. Lists of the splits (data-splits-v1_2.zip): two public readers
    # agree. That a name's first part is the pair of people is inferred from the names.
    Preset(
        name="holoassist",
        title="HoloAssist",
        domain="human",
        licence="CDLA-Permissive-2.0",
        files=(
            r"(?:^|/)(?P<group>[^/-]+)[^/]*/Export_py/Video_pitchshift\.mp4$",
            r"(?:^|/)(?P<group>[^/-]+)[^/]*/Export_py/Video_compress\.mp4$",
        ),
        tables=(
            (r"(?:^|/)train-v1_2\.txt$", "train"),
            (r"(?:^|/)val-v1_2\.txt$", "heldout"),
            (r"(?:^|/)test-v1_2\.txt$", "heldout"),
        ),
        columns=Columns(
            file=("{video_name}/Export_py/Video_pitchshift.mp4", "{video_name}/Export_py/Video_compress.mp4"),
            id="video_name",
            header=("video_name",),
        ),
    ),
    # github.com/rh20t/rh20t_api, rh20t_api/extract.py: CONFIGURATION/SCENE/cam_SERIAL/color.mp4; scenes named _human show people and are left out.
    # Pictures alone: actions lie in files of another kind. The rate that the files state was not compared with their timestamps.npy. Scenes 1 to
    # 5 are CC BY-SA 4.0, 6 to 10 CC BY-NC 4.0 (dataset card robot-lev/rh20t_cfg4; the owner's page could not be read).
    Preset(
        name="rh20t",
        title="RH20T",
        domain="robot",
        licence="CC BY-SA 4.0 (scenes 1 to 5), CC BY-NC 4.0 (scenes 6 to 10)",
        files=(r"(?:^|/)(?P<group>task_\d+_user_\d+_scene_\d+_cfg_\d+)/cam_[^/]+/color\.mp4$",),
    ),
    # github.com/IRVLUTD/HO-Cap, README.md and hocap/loaders/sequence_loader.py: SUBJECT/SEQUENCE/CAMERA/color_000000.jpg. 30 is the rate at which
    # the toolkit writes videos of them. Terms of the data unverified: the repository's licence is that of its code.
    Preset(
        name="ho-cap",
        title="HO-Cap",
        domain="human",
        licence=_UNKNOWN_LICENCE,
        files=(r"(?:^|/)(?P<group>subject_\d+)/[^/]+/[^/]+/color_(?P<number>\d+)\.jpg$",),
        fps=30.0,
    ),
    # No published data set: any folders of numbered pictures.
    Preset(
        name="frames",
        title="",
        domain="",
        licence="",
        files=(r"(?P<number>\d+)\.(?:jpe?g|png|bmp|webp|tiff?)$",),
        fps=30.0,
    ),
)


def presets() -> list[str]:
    """Names of all presets."""
    return [preset.name for preset in _PRESETS]


def preset_of(name: str) -> Preset:
    """The preset of a name. Raises UserError, with the nearest name and all others, where there is none."""
    for preset in _PRESETS:
        if preset.name == name:
            return preset
    near = difflib.get_close_matches(name.lower(), presets(), n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"preset {name}: no such preset; {hint}There are {', '.join(presets())}")
