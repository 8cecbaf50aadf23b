from __future__ import annotations

from pathlib import Path

import torch
from torch import distributed, multiprocessing

from cola_dist.config import BottleneckConfig
from cola_dist.models.bottleneck import build_bottleneck
from cola_dist.models.bottleneck.vq import VectorQuantiser


def _rank(rank: int, world: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    torch.save(_codebooks(_batch()[rank * 4 : rank * 4 + 4]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _batch() -> torch.Tensor:
    return torch.randn(8, 4, 2, 3, generator=torch.Generator().manual_seed(0))


def _codebooks(z: torch.Tensor) -> dict[str, torch.Tensor]:
    found = {}
    for kind in ("vq", "cosine", "rotation"):
        torch.manual_seed(0)
        quantiser = build_bottleneck(BottleneckConfig(kind=kind, codes=16, dim=3, init="data", reset_every=1), 0)
        assert isinstance(quantiser, VectorQuantiser)
        for step in range(3):
            quantiser(z + step, step)
        found[kind] = quantiser.codebook.detach()
    return found


def test_ranks_place_the_same_codes_as_one_process_does(tmp_path: Path) -> None:
    multiprocessing.start_processes(_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = _codebooks(_batch())
    for kind, codebook in alone.items():
        assert torch.equal(first[kind], second[kind]), kind
        assert torch.equal(first[kind], codebook), kind
