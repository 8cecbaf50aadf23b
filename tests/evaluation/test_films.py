from __future__ import annotations

import io

import matplotlib.image
import torch

from cola_dist.data.decode import decode_episode, probe_video
from cola_dist.evaluation.films import CELL, GAP, atlas_film, atlas_sheet, side_by_side, tile


def flat_clips(*levels: int, frames: int = 3, side: int = 32) -> torch.Tensor:
    return torch.stack([torch.full((frames, 3, side, side), level, dtype=torch.uint8) for level in levels])


def test_a_row_per_clip_and_columns_from_left_to_right() -> None:
    video = tile(torch.stack([flat_clips(10, 20), flat_clips(30, 40)], 1))
    step = CELL + GAP
    assert video.shape == (3, 2 * step, 2 * step, 3)
    assert [[int(video[0, row * step, column * step, 0]) for column in range(2)] for row in range(2)] == [[10, 30], [20, 40]]
    assert video[0, CELL].unique().tolist() == [255]


def test_films_play_at_the_clips_rate() -> None:
    data = side_by_side([flat_clips(10, 20), flat_clips(200, 100)], 5.0)
    step = CELL + GAP
    assert probe_video(data) == (3, 5.0, 2 * step, 2 * step)
    picture = decode_episode(data)[-1].to_ndarray(format="rgb24")
    assert abs(int(picture[10, 10, 0]) - 10) < 4
    assert abs(int(picture[10, step + 10, 0]) - 200) < 4


def test_an_atlas_fills_its_last_row_with_white() -> None:
    film = atlas_film(flat_clips(*range(0, 180, 20)), 5.0)
    step = CELL + GAP
    assert probe_video(film) == (3, 5.0, 8 * step, 2 * step)
    picture = decode_episode(film)[0].to_ndarray(format="rgb24")
    assert abs(int(picture[10, step + 10, 0]) - 20) < 4
    assert int(picture[-10, -10, 0]) > 250
    sheet = matplotlib.image.imread(io.BytesIO(atlas_sheet(flat_clips(0, 60, 120), 5.0)))
    assert sheet.shape[0] > 3 * step
    assert sheet.shape[1] > 3 * step
