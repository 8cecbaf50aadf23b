"""Where weights go when a model is loaded: to no memory but that of their place, read by one rank for all."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from cola_dist.config import AutoencoderConfig
from cola_dist.errors import UserError
from cola_dist.models import published
from cola_dist.models.autoencoders import build_autoencoder
from cola_dist.models.published import Place
from cola_dist.models.world import STDiT3, WanVideo
from tests.models.published import STDIT, WAN, write_stdit3, write_wan, write_wan_vae

NOWHERE = Place(torch.device("meta"))
LARGE = {"channels": 4, "patch": 2, "width": 512, "depth": 4, "heads": 8, "fps": 5}


def test_nowhere_checks_files_and_keeps_nothing(tmp_path: Path) -> None:
    folder = str(write_wan(tmp_path / "wan"))
    model = WanVideo.from_pretrained(folder, WAN, NOWHERE)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.content_hash == WanVideo.from_pretrained(folder, WAN).content_hash
    shard = next((tmp_path / "wan").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-64])
    with pytest.raises(UserError, match="cannot be read"):
        WanVideo.from_pretrained(folder, WAN, NOWHERE)


def _anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def _most_memory_while_loading(folder: str, place: Place, whole: int) -> float:
    """The most memory that loading takes at any tensor, in sizes of the model."""
    put, seen = published._put, []

    def watched(model: nn.Module, key: str, tensor: Tensor, place: Place) -> None:
        put(model, key, tensor, place)
        seen.append(_anonymous_bytes())

    published._put = watched
    before = _anonymous_bytes()
    STDiT3.from_pretrained(folder, LARGE, place)
    return (max(seen) - before) / whole


def test_no_more_than_a_few_tensors_are_in_memory_at_a_time(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = str(tmp_path)
    whole = sum(tensor.nbytes for tensor in STDiT3(**LARGE).state_dict().values())
    STDiT3(**LARGE).save_pretrained(folder)
    took = {}
    for name, place in (("nowhere", NOWHERE), ("here", published.HERE)):
        # In a process of its own: memory that earlier tests have freed would be used again, unseen.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            # Once for what the first use of libraries takes.
            fresh.submit(_most_memory_while_loading, folder, NOWHERE, whole).result()
            took[name] = fresh.submit(_most_memory_while_loading, folder, place, whole).result()
    assert took["nowhere"] < 0.25
    assert 0.8 < took["here"] < 1.3


def _load_in_rank(rank: int, port: int, work: Callable[[], Tensor], results: Path) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    if rank:
        # Only the first one may look at files of weights.
        published.weight_files = lambda uri: pytest.fail("the second rank read files")  # type: ignore[assignment]
    try:
        found = work()
    except UserError as error:
        (results / f"{rank}.txt").write_text(str(error))
    else:
        torch.save(found, results / f"{rank}.pt")
    dist.destroy_process_group()


def together(work: Callable[[], Tensor], results: Path) -> None:
    results.mkdir()
    mp.spawn(_load_in_rank, args=(20000 + os.getpid() % 20000, work, results), nprocs=2)


class LoadsGenerator:
    """A flat copy of a generator's weights; a class, because it goes to other processes."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> Tensor:
        model = STDiT3.from_pretrained(self.folder, STDIT, Place(torch.device("cpu"), together=True))
        return torch.cat([tensor.flatten() for tensor in model.state_dict().values()])


class Encodes:
    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self) -> Tensor:
        torch.manual_seed(0)
        autoencoder = build_autoencoder(AutoencoderConfig("wan", self.folder), False, Place(torch.device("cpu"), together=True))
        return autoencoder.encode(torch.randint(0, 256, (1, 5, 3, 16, 16), dtype=torch.uint8))


def test_one_rank_reads_for_all(tmp_path: Path) -> None:
    folder = str(write_stdit3(tmp_path / "generator"))
    together(LoadsGenerator(folder), tmp_path / "results")
    first, second = (torch.load(tmp_path / "results" / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
    alone = STDiT3.from_pretrained(folder, STDIT)
    assert torch.equal(first, torch.cat([tensor.flatten() for tensor in alone.state_dict().values()]))


def test_what_one_rank_cannot_read_all_of_them_refuse(tmp_path: Path) -> None:
    folder = write_stdit3(tmp_path / "generator")
    (folder / "model.safetensors").write_bytes(b"x" * 1000)
    together(LoadsGenerator(str(folder)), tmp_path / "results")
    assert len({(tmp_path / "results" / f"{rank}.txt").read_text() for rank in range(2)}) == 1


def test_an_autoencoder_is_sent_too(tmp_path: Path) -> None:
    together(Encodes(str(write_wan_vae(tmp_path / "vae"))), tmp_path / "results")
    first, second = (torch.load(tmp_path / "results" / f"{rank}.pt") for rank in range(2))
    assert torch.equal(first, second)
