"""Each preset on a miniature of the layout in which its data set is published."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cola_dist.data.sources.presets import presets
from cola_dist.errors import UserError
from tests.data.footage import origin, picture, read
from tests.data.videos import encoded, moving_square

CLIP = {kind: encoded(moving_square(80), kind) for kind in ("mp4", "webm")}


@dataclass(frozen=True)
class Expected:
    """Of each recording: group, split, text, seconds at which it begins and ends; how often which reason leaves something out."""

    recordings: dict[str, tuple[str, str, str | None, float, float]]
    skipped: dict[str, int] = field(default_factory=dict)
    domain: str = "human"
    licence: str = "as the original dataset"


def lay(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(CLIP["webm" if path.suffix == ".webm" else "mp4"])


def write(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def something_something(folder: Path) -> Expected:
    lay(folder, *(f"20bn-something-something-v2/{number}.webm" for number in (78687, 42326, 100904, 7)))
    (folder / "20bn-something-something-v2" / "100904.webm").write_bytes(b"")
    entry = {"template": "Holding [something]", "placeholders": ["potato"]}
    train = [{"id": "78687", "label": "holding potato", **entry}, {"id": "5", "label": "holding cup", **entry}]
    train.append({"id": "100904", "label": "holding pen", **entry})
    write(folder / "labels" / "train.json", json.dumps(train))
    write(folder / "labels" / "validation.json", json.dumps([{"id": "42326", "label": "lifting a cup", **entry}]))
    write(folder / "labels" / "test.json", json.dumps([{"id": "7"}]))
    write(folder / "labels" / "labels.json", json.dumps({"Holding something": "16"}))
    below = "20bn-something-something-v2"
    return Expected(
        {
            f"{below}/78687.webm#78687": (f"{below}/78687.webm", "train", "holding potato", 0, 8),
            f"{below}/42326.webm#42326": (f"{below}/42326.webm", "heldout", "lifting a cup", 0, 8),
            f"{below}/7.webm#7": (f"{below}/7.webm", "heldout", None, 0, 8),
        },
        {"file missing": 1, "empty file": 1},
    )


def ego4d(folder: Path) -> Expected:
    uids = [f"{number:08x}-3f9d-4fe6-bfb3-045b368f7d44" for number in range(4)]
    lay(
        folder,
        f"v2/full_scale/{uids[0]}.mp4",
        f"v2/full_scale/{uids[1]}.mp4",
        f"v2/video_540ss/{uids[1]}.mp4",
        f"v2/full_scale/{uids[3]}.mp4",
    )
    write(folder / "v2" / "full_scale" / "manifest.csv", "video_uid,canonical_s3_location", f"{uids[0]},s3://somewhere")
    videos = [
        {"video_uid": uid, "duration_sec": 8.0, "fb_participant_id": person, "scenarios": ["Cooking", "Cleaning"], "split_em": "train"}
        for uid, person in zip(uids[:3], (12.0, None, 3), strict=True)
    ]
    write(folder / "ego4d.json", json.dumps({"date": "220925", "videos": videos, "concurrent_video_sets": [], "physical_settings": []}))
    return Expected(
        {
            f"v2/full_scale/{uids[0]}.mp4#{uids[0]}": ("12", "", "Cooking, Cleaning", 0, 8),
            f"v2/video_540ss/{uids[1]}.mp4#{uids[1]}": (f"v2/video_540ss/{uids[1]}.mp4", "", "Cooking, Cleaning", 0, 8),
        },
        {"file missing": 1},
        licence="Ego4D licence agreement",
    )


def epic_kitchens(folder: Path) -> Expected:
    lay(folder, "EPIC-KITCHENS/P01/videos/P01_11.MP4", "EPIC-KITCHENS/P01/videos/P01_101.MP4", "EPIC-KITCHENS/P02/videos/P02_03.MP4")
    annotations = folder / "epic-kitchens-100-annotations"
    times = "narration_id,participant_id,video_id,narration_timestamp,start_timestamp,stop_timestamp,start_frame,stop_frame"
    header = f"{times},narration,verb,verb_class,noun,noun_class,all_nouns,all_noun_classes"
    rest = "take,0,plate,2,\"['plate', 'cup']\",\"[2, 13]\""
    write(
        annotations / "EPIC_100_train.csv",
        header,
        f"P02_03_0,P02,P02_03,00:00:00.560,00:00:00.50,00:00:03.00,25,150,take plate,{rest}",
        f"P02_03_1,P02,P02_03,00:00:03.000,00:00:02.00,00:00:07.10,100,355,put plate,{rest}",
        f"P02_03_2,P02,P02_03,00:00:03.000,00:00:04.00,00:00:05.10,200,255,too short,{rest}",
        f"P02_03_3,P02,P02_03,00:00:03.000,00:01:04.00,00:01:09.10,200,255,too late,{rest}",
        f"P04_01_0,P04,P04_01,00:00:03.000,00:00:04.00,00:00:09.10,200,255,elsewhere,{rest}",
    )
    write(
        annotations / "EPIC_100_validation.csv", header, f"P01_11_0,P01,P01_11,00:00:00.560,00:00:01.00,00:00:04.00,50,200,take cup,{rest}"
    )
    write(annotations / "EPIC_100_test_timestamps.csv", times, "P01_101_0,P01,P01_101,00:00:02.851,00:00:02.00,00:00:05.00,143,193")
    write(annotations / "EPIC_100_video_info.csv", "video_id,duration,fps,resolution", "P01_11,8,10,64x48")
    at = "EPIC-KITCHENS/{}/videos/{}"
    return Expected(
        {
            at.format("P02", "P02_03.MP4#P02_03_0"): ("P02", "train", "take plate", 0.5, 3.0),
            at.format("P02", "P02_03.MP4#P02_03_1"): ("P02", "train", "put plate", 2.0, 7.1),
            at.format("P01", "P01_11.MP4#P01_11_0"): ("P01", "heldout", "take cup", 1.0, 4.0),
            at.format("P01", "P01_101.MP4#P01_101_0"): ("P01", "heldout", None, 2.0, 5.0),
        },
        {"file missing": 1, "shorter than 2 s": 1, "times beyond the end of the file": 1},
        licence="CC BY-NC 4.0",
    )


def egtea(folder: Path) -> Expected:
    lay(folder, "videos/OP01-R01-PastaSalad.mp4", "videos/P05-R01-PastaSalad.mp4")
    lay(folder, "video_clips/cropped_clips/OP01-R01-PastaSalad/OP01-R01-PastaSalad-66680-68130-F001597-F001639.mp4")
    write(
        folder / "action_annotation" / "raw_annotations" / "action_labels.csv",
        "# Clip ID (Unique, used only internally); Clip Prefix (Unique); Video Session; Starting Time (ms);  Ending Time (ms); Action Label;"
        " Verb Label; Noun Label(s)",
        "1; P05-R01-PastaSalad-1200-5000; P05-R01-PastaSalad; 1200; 5000; Cut tomato; Cut; tomato",
        "2; OP01-R01-PastaSalad-0-2500; OP01-R01-PastaSalad; 0; 2500; Transfer cucumber,bowl; Transfer; cucumber,bowl",
        "3; OP01-R01-PastaSalad-4000-3000; OP01-R01-PastaSalad; 4000; 3000; Take cup; Take; cup",
        "4; P09-R01-Pizza-0-2500; P09-R01-Pizza; 0; 2500; Take cup; Take; cup",
    )
    return Expected(
        {
            "videos/P05-R01-PastaSalad.mp4#P05-R01-PastaSalad-1200-5000": ("P05", "", "Cut tomato", 1.2, 5.0),
            "videos/OP01-R01-PastaSalad.mp4#OP01-R01-PastaSalad-0-2500": ("OP01", "", "Transfer cucumber,bowl", 0.0, 2.5),
        },
        {"file missing": 1, "ends before it starts": 1},
    )


def egopat3d(folder: Path) -> Expected:
    names = [f"Dataset/1/bathroomCabinet_{number}" for number in (1, 2)]
    lay(folder, *(f"{name}/rgb_video.mp4" for name in names))
    (folder / names[1] / "rgb_video.mp4").write_bytes(CLIP["mp4"][:500])
    write(folder / names[0] / "hand_frames" / "clip_ranges.txt", "1 30")
    write(folder / "Dataset/1/bathroomCabinet.ply", "ply")
    return Expected({f"{names[0]}/rgb_video.mp4": ("bathroomCabinet_1", "", None, 0, 8)}, {"damaged": 1})


def hoi4d(folder: Path) -> Expected:
    first, second = "ZY20210800004/H4/C8/N14/S71/s03/T2", "ZY20210800001/H1/C2/N01/S200/s01/T1"
    lay(folder, f"HOI4D_release/{first}/align_rgb/image.mp4", f"HOI4D_release/{second}/align_rgb/image.mp4")
    lay(folder, f"HOI4D_depth_video/{first}/align_depth/depth_video.avi")
    write(folder / "HOI4D_annotations" / first / "action" / "color.json", "{}")
    return Expected(
        {
            f"HOI4D_release/{first}/align_rgb/image.mp4": ("H4", "", None, 0, 8),
            f"HOI4D_release/{second}/align_rgb/image.mp4": ("H1", "", None, 0, 8),
        }
    )


def holoassist(folder: Path) -> Expected:
    names = ["R007-7July-DSLR", "R158-3Oct-RAM & Graphicscard", "z045-june-24-22-dslr"]
    lay(
        folder,
        *(f"{name}/Export_py/Video_pitchshift.mp4" for name in names[:2]),
        *(f"{name}/Export_py/Video_compress.mp4" for name in names[1:]),
    )
    write(folder / names[0] / "Export_py" / "Video" / "Pose_sync.txt", "1 2 3")
    write(folder / "data-splits-v1_2" / "train-v1_2.txt", names[0], "R999-gone")
    write(folder / "data-splits-v1_2" / "val-v1_2.txt", names[1])
    write(folder / "data-splits-v1_2" / "test-v1_2.txt", names[2])
    return Expected(
        {
            f"{names[0]}/Export_py/Video_pitchshift.mp4#{names[0]}": ("R007", "train", None, 0, 8),
            f"{names[1]}/Export_py/Video_pitchshift.mp4#{names[1]}": ("R158", "heldout", None, 0, 8),
            f"{names[2]}/Export_py/Video_compress.mp4#{names[2]}": ("z045", "heldout", None, 0, 8),
        },
        {"file missing": 1},
        licence="CDLA-Permissive-2.0",
    )


def rh20t(folder: Path) -> Expected:
    scene = "task_0001_user_0016_scene_0001_cfg_0003"
    cameras = [f"RH20T_cfg3/{scene}/cam_{serial}/color.mp4" for serial in ("036422060909", "f0172289")]
    lay(folder, *cameras, f"RH20T_cfg3/{scene}_human/cam_036422060909/color.mp4", f"RH20T_cfg3/{scene}/cam_036422060909/depth.mp4")
    write(folder / "RH20T_cfg3" / scene / "metadata.json", "{}")
    licence = "CC BY-SA 4.0 (scenes 1 to 5), CC BY-NC 4.0 (scenes 6 to 10)"
    return Expected(dict.fromkeys(cameras, (scene, "", None, 0, 8)), domain="robot", licence=licence)


def numbered(folder: Path, pattern: str, frames: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, pixels in enumerate(moving_square(frames)):
        (folder / pattern.format(number)).write_bytes(picture(pixels, "mjpeg"))


def ho_cap(folder: Path) -> Expected:
    sequence = "subject_1/20231025_165502"
    for camera, frames in (("105322251564", 75), ("hololens_kv5h72", 75), ("037522251142", 45)):
        numbered(folder / sequence / camera, "color_{:06d}.jpg", frames)
    numbered(folder / sequence / "105322251564", "depth_{:06d}.png", 3)
    write(folder / sequence / "meta.json", "{}")
    write(folder / "calibration" / "mano" / "subject_1" / "mano.json", "{}")
    recordings = {f"{sequence}/{camera}": ("subject_1", "", None, 0, 2.5) for camera in ("105322251564", "hololens_kv5h72")}
    return Expected(dict(recordings), {"shorter than 2 s": 1})


def frames(folder: Path) -> Expected:
    numbered(folder / "walk", "{}.jpg", 75)
    numbered(folder / "single", "frame_{}.jpg", 1)
    return Expected({"walk": ("walk", "", None, 0, 2.5)}, {"single picture": 1}, licence="as the original file")


MINIATURES: dict[str, Callable[[Path], Expected]] = {
    "something-something-v2": something_something,
    "ego4d": ego4d,
    "epic-kitchens": epic_kitchens,
    "egtea-gaze-plus": egtea,
    "egopat3d": egopat3d,
    "hoi4d": hoi4d,
    "holoassist": holoassist,
    "rh20t": rh20t,
    "ho-cap": ho_cap,
    "frames": frames,
}


@pytest.mark.parametrize("preset", presets())
def test_a_preset_reads_the_layout_of_its_data_set(tmp_path: Path, preset: str) -> None:
    expected = MINIATURES[preset](tmp_path)
    opened = origin(tmp_path, preset=preset)
    assert opened.domain == expected.domain
    episodes, skipped = read(opened)
    found = {}
    for episode in episodes:
        about = episode.meta
        found[episode.recording] = (
            episode.group,
            episode.split,
            about.get("text"),
            *(about["provenance"][name] for name in ("start_s", "end_s")),
        )
        assert about["licence"] == expected.licence
        assert about["provenance"]["dataset"] == opened.dataset
    assert found == {
        name: (*told, pytest.approx(start, abs=0.1), pytest.approx(end, abs=0.1))
        for name, (*told, start, end) in expected.recordings.items()
    }
    assert Counter(each.reason for each in skipped) == expected.skipped
    assert len({episode.key for episode in episodes}) == len(episodes)


def groups(preset: str, folder: Path, **options: str) -> Sequence[tuple[str, str, str]]:
    return [(episode.recording, episode.group, episode.split) for episode in read(origin(folder, preset=preset, **options))[0]]


def test_without_its_tables_a_data_set_is_taken_whole(tmp_path: Path) -> None:
    lay(tmp_path / "epic", "P01/videos/P01_11.MP4", "P02/P02_03.MP4", "other.mp4")
    assert groups("epic-kitchens", tmp_path / "epic") == [("P01/videos/P01_11.MP4", "P01", ""), ("P02/P02_03.MP4", "P02", "")]
    # Cut clips are taken where there are no whole videos; the table, whose times are those of the whole ones, then says nothing about them.
    clips = [f"cropped_clips/P05-R01-PastaSalad/P05-R01-PastaSalad-{number}-9-F000001-F000009.mp4" for number in (1, 2)]
    lay(tmp_path / "egtea", *clips)
    write(
        tmp_path / "egtea" / "action_labels.csv",
        "# Clip Prefix (Unique); Video Session; Starting Time (ms); Ending Time (ms); Action Label",
        "P05-R01-PastaSalad-1-9-F000001-F000009; P05-R01-PastaSalad; 583261; 586055; Cut tomato",
    )
    assert groups("egtea-gaze-plus", tmp_path / "egtea") == [(name, "P05", "") for name in clips]


def test_tables_may_lie_elsewhere(tmp_path: Path) -> None:
    epic_kitchens(tmp_path)
    annotations = tmp_path / "elsewhere"
    (tmp_path / "epic-kitchens-100-annotations").rename(annotations)
    videos = tmp_path / "EPIC-KITCHENS"
    for table, splits in (
        (str(annotations), ["heldout", "heldout", "train", "train"]),
        (f"{annotations}/EPIC_100_train.csv", ["train", "train"]),
        (f"file://{annotations}/EPIC_100_validation.csv", ["heldout"]),
    ):
        assert [split for _, _, split in groups("epic-kitchens", videos, table=table)] == splits
    with pytest.raises(UserError, match="no column start_timestamp, stop_timestamp; its columns are video_id, duration"):
        origin(videos, preset="epic-kitchens", table=f"{annotations}/EPIC_100_video_info.csv")
    with pytest.raises(UserError, match="none of its files is a table of EPIC-KITCHENS-100"):
        origin(videos, preset="epic-kitchens", table=str(videos))


def test_what_the_user_says_counts_where_a_preset_leaves_it_open(tmp_path: Path) -> None:
    rh20t(tmp_path)
    assert origin(tmp_path, preset="rh20t", domain="human").domain == "robot"
    assert {episode.meta["licence"] for episode in read(origin(tmp_path, preset="rh20t", licence="mine"))[0]} == {"mine"}
    numbered(tmp_path / "a", "{}.jpg", 2)
    assert origin(tmp_path, preset="frames", domain="robot").domain == "robot"
    with pytest.raises(UserError, match="domain missing: give robot or human"):
        origin(tmp_path, preset="frames", domain="")


def test_an_unknown_preset_is_told_the_nearest() -> None:
    with pytest.raises(UserError, match=r"preset epic-kitchen: no such preset; did you mean epic-kitchens\? There are .*rh20t") as caught:
        origin("nowhere", preset="epic-kitchen")
    assert "\n" not in str(caught.value)
