"""The speed of LeRobot's dataset class over the episodes of a folder, for `bench_data.py --lerobot PYTHON`: needs lerobot, and nothing of cola-dist.

    python lerobot_loader.py EPISODES --frames 9 --stride 2 --seconds 20 --batch 32 --workers 2

EPISODES is a folder of MP4 files of one size and rate. They are written anew as LeRobot's own writer does, then read back as its class reads them:
single frames by time stamps. Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import torch
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from loader_speed import measure


def write(episodes: list[Path], root: str) -> float:
    """Write the episodes as a LeRobot dataset and return their frames per second."""
    written = None
    for path in episodes:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if written is None:
                rate = float(stream.average_rate)
                shape = (stream.height, stream.width, 3)
                features = {"observation.image": {"dtype": "video", "shape": shape, "names": ["height", "width", "channels"]}}
                features["action"] = {"dtype": "float32", "shape": (2,), "names": ["x", "y"]}
                written = LeRobotDataset.create("bench/bench", round(rate), features, root=root, use_videos=True, vcodec="h264")
            for frame in container.decode(stream):
                pixels = frame.to_ndarray(format="rgb24")
                written.add_frame({"observation.image": pixels, "action": np.zeros(2, np.float32), "task": "none"})
        written.save_episode()
    written.finalize()
    return rate


def backend() -> str:
    """LeRobot's default decoder, or its other one where FFmpeg's libraries are missing, without which the default does not load."""
    try:
        import torchcodec  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return "pyav"
    return "torchcodec"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("episodes", type=Path)
    for name in ("frames", "stride", "seconds", "batch", "workers"):
        parser.add_argument(f"--{name}", type=int, required=True)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        rate = write(sorted(asked.episodes.glob("*.mp4")), f"{scratch}/dataset")
        stamps = {"observation.image": [index * asked.stride / round(rate) for index in range(asked.frames)]}
        data = LeRobotDataset("bench/bench", root=f"{scratch}/dataset", delta_timestamps=stamps, video_backend=backend())
        loader = torch.utils.data.DataLoader(data, batch_size=asked.batch, shuffle=True, num_workers=asked.workers, persistent_workers=True)
        speed = measure((len(batch["action"]) for _ in itertools.count() for batch in loader), asked.seconds)
    print(json.dumps(asdict(speed)), flush=True)
    os._exit(0)  # its workers would be waited for


if __name__ == "__main__":
    main()
