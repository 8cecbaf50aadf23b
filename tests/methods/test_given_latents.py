"""Methods on clips whose latents were made beforehand."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from method_parts import awaken

from cola_dist.config import RunConfig
from cola_dist.methods import Clips, build_method
from cola_dist.models.autoencoder import PixelAutoencoder


def with_latents(clips: Clips, factor: float = 1.0) -> Clips:
    return replace(clips, latents=factor * PixelAutoencoder().encode(clips.video))


@pytest.mark.parametrize("name", ["cotrain", "pretrain"])
def test_given_latents_are_what_a_method_models(config: RunConfig, clips: Clips, name: Literal["cotrain", "pretrain"]) -> None:
    method = build_method(replace(config, method=name), bf16=False)
    awaken(method)
    method.eval()
    own, given, other = (method(c, 0).loss for c in (clips, with_latents(clips), with_latents(clips, 0.5)))
    assert torch.equal(own, given)
    assert not torch.equal(own, other)
    looks = [method.evaluate(c)["flow_own"] for c in (clips, with_latents(clips), with_latents(clips, 0.5))]
    assert torch.equal(looks[0], looks[1])
    assert not torch.equal(looks[0], looks[2])


@pytest.mark.parametrize("latents", [False, True])
def test_parts_of_a_batch_keep_all_that_belongs_to_a_clip(clips: Clips, latents: bool) -> None:
    whole = with_latents(clips) if latents else clips
    parts = whole.to("cpu").split(4)
    assert [len(part) for part in parts] == [4, 2]
    for name in ("video", "position", "source", "latents"):
        column = getattr(whole, name)
        if column is None:
            assert [getattr(part, name) for part in parts] == [None, None]
        else:
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), column)
