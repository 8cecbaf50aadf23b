"""What an evaluation says of itself, and what it refuses before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cola_dist.data.stream import open_reader
from cola_dist.errors import UserError
from cola_dist.evaluation.evaluate import NetworkChoice, Request, plan
from cola_dist.evaluation.protocol import partner_of
from jobs import evaluate as job
from tests.evaluation.networks import fvd_network
from tests.toy import write_folder
from tests.train.harness import run_local, toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("protocol")
    run_local(toy_config(folder, "--train.workers=1", "--warmup.steps=1", "--joint.steps=1"), folder / "run")
    return folder / "run"


def test_clips_are_named_and_all_that_decides_a_clips_figures_is_in_the_key(run: Path, tmp_path: Path) -> None:
    protocol = plan(Request(str(run), clips=12)).protocol
    assert len(protocol.clips) == len(set(protocol.clips)) == protocol.samples == 12
    assert all(clip.startswith(("robot/robot-000", "hand/hand-000")) for clip in protocol.clips)
    same = plan(Request(str(run / "export"), clips=5)).protocol
    assert (same.key, same.clips) == (protocol.key, protocol.clips[:5]), "clips keep their figures when others join them"
    others = (
        Request(str(run), guidance=2.0),
        Request(str(run), sampler_steps=3),
        Request(str(run), context=2),
        Request(str(run), frames=4),
        Request(str(run), mixture={str(run.parent / "robot"): 1.0}),
        Request(str(run), gpus=True),
        Request(str(run), fvd=NetworkChoice(fvd_network(tmp_path / "i3d.pt"))),
    )
    keys = [plan(replace(request, clips=4)).protocol.key for request in others]
    assert len({protocol.key, *keys}) == 1 + len(others)


def test_the_clip_that_lends_its_actions_is_another_one_of_the_same_source(run: Path) -> None:
    reader = plan(Request(str(run), clips=12)).reader
    for position in range(12):
        own, other = reader.order.clip(position), reader.order.clip(partner_of(reader, position))
        assert other.source == own.source
        assert other.episode != own.episode


def test_a_set_of_one_episode_lends_its_other_clips(tmp_path: Path) -> None:
    write_folder(tmp_path / "robot", "robot", episodes=3)
    write_folder(tmp_path / "hand", "hand", episodes=3)
    data = toy_config(tmp_path).data
    reader = open_reader(replace(data, mixture={str(tmp_path / "robot"): 1.0}), 0, "heldout")
    own, other = reader.order.clip(0), reader.order.clip(partner_of(reader, 0))
    assert own.start != other.start
    whole = replace(data, mixture={str(tmp_path / "robot"): 1.0}, frames=20)
    with pytest.raises(UserError, match=r"holds one clip \(robot/robot-0002@0\): pack more episodes"):
        partner_of(open_reader(whole, 0, "heldout"), 0)


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(cpus: float, debug: bool) -> None:
        raise AssertionError("bad input is found before a cluster is touched")

    monkeypatch.setattr("cola_dist.runtime.connect", refuse)


@pytest.mark.usefixtures("no_cluster")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--clips", "1"], "--clips 1: give at least 2"),
        (["--clips", "99"], "which holds 8 held-out clips of 5 frames: give --clips 16 or fewer"),
        (["--frames", "21"], "has no episode of at least 21 frames at this rate (what is evaluated is chosen by --mixture and --frames)"),
        (["--frames", "1"], "--frames 1: autoencoder pixels takes 1 + 1 n frames"),
        (["--context", "5"], "--context 5: give 1 + 1 n frames, fewer than the clip's 5"),
        (["--mixture", "EMPTY", "1"], "(heldout split): source 'empty' has no episode"),
        (["--mixture", "NOWHERE", "1"], "NOWHERE"),
        (["--fvd.weights", "NOWHERE"], "FVD network NOWHERE is missing"),
        (["--fvd.weights", "I3D", "--fvd.sha256", "12ab"], "not 12ab: give the file that is meant"),
        (["--workers", "0"], "--workers and --batch must be at least 1"),
    ],
)
def test_bad_input_is_one_line(run: Path, tmp_path: Path, options: list[str], message: str) -> None:
    write_folder(tmp_path / "EMPTY", "empty", episodes=2)
    names = {"EMPTY": str(tmp_path / "EMPTY"), "I3D": fvd_network(tmp_path / "i3d.pt")}
    with pytest.raises(UserError) as raised:
        job.main([str(run), *(names.get(word, word) for word in options)])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("no_cluster")
def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no export"):
        job.main([str(tmp_path)])
