"""Tracking through its public entry points, against MLflow's own SQLite store and a real ``mlflow server``."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from matplotlib.figure import Figure

from cola_dist import tracking
from cola_dist.tracking import NullTracker, RunTracker, Tracker, deliver, run_id, waiting

PATIENCE = 180.0
CHILD = """
import sys, time
from pathlib import Path
from cola_dist import tracking
tracking.DELIVERY_INTERVAL = 0.05
tracker = tracking.Tracker(Path(sys.argv[1]), sys.argv[2], "killed", sys.argv[3], artifacts=sys.argv[4])
for step in range(1_000_000):
    tracker.log_metrics({"loss": step / 7, "gap": -step}, step)
    print(step, flush=True)
    time.sleep(0.002)
"""
FULL_DISK = """
import resource, sys
from pathlib import Path
from cola_dist.tracking import Tracker
tracker = Tracker(Path(sys.argv[1]), "http://127.0.0.1:9", "full", "full")
tracker.log_metrics({"loss": 0.0}, 0)
free, most = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, most))
tracker.log_metrics({"loss": 1.0}, 1)
tracker.log_metrics({"loss": 2.0}, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (free, most))
tracker.log_metrics({"loss": 3.0}, 3)
tracker.finish("FAILED", wait=0.0)
"""
IMPORTS = """
import json, sys, threading
from pathlib import Path
importers = set()
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in ("mlflow", "matplotlib"):
            importers.add("caller" if threading.current_thread() is threading.main_thread() else "tracking")
sys.meta_path.insert(0, Watch())
from cola_dist.tracking import Tracker
folder = Path(sys.argv[1])
tracker = Tracker(folder / "run", f"sqlite:///{folder}/mlflow.db", "imports", "imports", artifacts=(folder / "artifacts").as_uri())
tracker.log_metrics({"loss": 0.0}, 0)
print(json.dumps({"delivered": tracker.finish("FINISHED", wait=50.0), "importers": sorted(importers)}))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A tracking server that starts in the background; ``wait_for`` waits until it answers."""
    folder = tmp_path_factory.mktemp("server")
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True)
    yield f"http://127.0.0.1:{port}", process
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def store(server: tuple[str, subprocess.Popen[bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of one SQLite store for the whole module: creating its tables takes seconds. The server starts meanwhile."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "DELIVERY_INTERVAL", 0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(server: tuple[str, subprocess.Popen[bytes]]) -> str:
    uri, process = server
    for _ in range(int(PATIENCE / 0.2)):
        assert process.poll() is None, "the tracking server ended"
        try:
            with urllib.request.urlopen(f"{uri}/health", timeout=1):
                return uri
        except OSError:
            time.sleep(0.2)
    raise AssertionError("the tracking server does not answer")


def database(store: Path) -> str:
    return f"sqlite:///{store}/mlflow.db"


def start(store: Path, spool: Path, **options: str) -> Tracker:
    return Tracker(spool, database(store), "runs", spool.name, artifacts=(store / "artifacts").as_uri(), **options)


def history(client: mlflow.MlflowClient, spool: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of every point of a metric, by step."""
    run = run_id(spool)
    assert run is not None
    return sorted((point.step, point.value) for point in client.get_metric_history(run, name))


def artifact(client: mlflow.MlflowClient, spool: Path, name: str, folder: Path) -> bytes:
    return Path(client.download_artifacts(run_id(spool), name, str(folder))).read_bytes()


def test_everything_arrives(store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "run"
    tracker: RunTracker = start(store, spool)
    tracker.log_params({"seed": "0", "data.mixture[robot]": "0.5"})
    tracker.set_tags({"host": "a"})
    for step in range(3):
        tracker.log_metrics({"loss": 1.0 / (step + 1), "codebook/utilisation": 0.5}, step)
    tracker.log_metrics({"bad": math.nan}, 0)
    tracker.log_metrics({"bad": math.inf}, 1)
    tracker.log_metrics({f"code{index}": index for index in range(2500)}, 2)
    assert tracker.backlog_bytes() > 0
    tracker.log_text("recipe: tiny\n", "config/resolved.yaml")
    tracker.log_file(b"\x00\x01video", "rollout/step2.mp4")
    figure = Figure()
    figure.subplots().plot([0, 1])
    tracker.log_figure(figure, "histogram.png")
    assert tracker.finish("FINISHED", wait=PATIENCE)
    assert tracker.backlog_bytes() == 0

    client = mlflow.MlflowClient(database(store))
    run = client.get_run(run_id(spool))
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert run.data.params == {"seed": "0", "data.mixture_robot_": "0.5"}
    assert run.data.tags["host"] == "a"
    assert history(client, spool, "loss") == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert history(client, spool, "codebook/utilisation") == [(0, 0.5), (1, 0.5), (2, 0.5)]
    assert [math.isnan(value) for _, value in history(client, spool, "bad")] == [True, True]
    assert {f"code{index}": float(index) for index in range(2500)}.items() <= run.data.metrics.items()
    assert artifact(client, spool, "config/resolved.yaml", tmp_path) == b"recipe: tiny\n"
    assert artifact(client, spool, "rollout/step2.mp4", tmp_path) == b"\x00\x01video"
    assert artifact(client, spool, "histogram.png", tmp_path).startswith(b"\x89PNG")
    assert list((spool / "files").iterdir()) == [], "delivered files must not fill the disk"


def test_opening_a_spool_again_continues_its_run(store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "again"
    first = start(store, spool)
    first.log_params({"steps": "10", "seed": "1"})
    first.log_metrics({"loss": 2.0}, 0)
    assert first.finish("FAILED", wait=PATIENCE)
    before = run_id(spool)

    second = start(store, spool)
    second.log_params({"steps": "20", "seed": "1"})
    second.log_metrics({"loss": 1.0}, 1)
    assert second.finish("FINISHED", wait=PATIENCE)

    client = mlflow.MlflowClient(database(store))
    run = client.get_run(before)
    assert run_id(spool) == before
    assert run.info.status == "FINISHED"
    assert history(client, spool, "loss") == [(0, 2.0), (1, 1.0)]
    assert run.data.params == {"steps": "10", "seed": "1"}
    assert {name: value for name, value in run.data.tags.items() if name.startswith("changed/")} == {"changed/steps": "20"}


def test_identity_continues_a_run_whose_spool_is_on_another_machine(store: Path, tmp_path: Path) -> None:
    here, there, other = tmp_path / "here", tmp_path / "there", tmp_path / "other"
    for spool, identity in ((here, "run-7"), (there, "run-7"), (other, "run-8")):
        tracker = start(store, spool, identity=identity)
        tracker.log_metrics({"loss": 1.0}, 0)
        assert tracker.finish("FINISHED", wait=PATIENCE)
    assert run_id(here) == run_id(there) != run_id(other)


def test_a_second_delivery_changes_nothing(store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "twice"
    tracker = start(store, spool)
    tracker.log_params({"seed": "0"})
    for step in range(50):
        tracker.log_metrics({"loss": step / 7, "bad": math.nan}, step)
    tracker.log_text("text", "note.txt")
    assert tracker.finish("FINISHED", wait=PATIENCE)
    client = mlflow.MlflowClient(database(store))
    run, steps = run_id(spool), range(50)

    # As after a kill between MLflow's confirmation and the stored position.
    (spool / "delivered.json").write_text(json.dumps({"run_id": run, "offset": 0}))
    assert deliver(spool, PATIENCE)
    # As after a kill between the creation of the run and the stored run id.
    (spool / "delivered.json").unlink()
    assert deliver(spool, PATIENCE)
    assert run_id(spool) == run
    assert history(client, spool, "loss") == [(step, step / 7) for step in steps]
    assert [step for step, _ in history(client, spool, "bad")] == list(steps)
    assert client.get_run(run).info.status == "FINISHED"


def test_kill_9_loses_nothing_and_doubles_nothing(store: Path, tmp_path: Path) -> None:
    """Two processes write to one SQLite database at once; both are killed in mid-run."""
    spools = [tmp_path / "first", tmp_path / "second"]
    arguments = [[str(spool), database(store), spool.name, (store / "artifacts").as_uri()] for spool in spools]
    children = [subprocess.Popen([sys.executable, "-c", CHILD, *argument], stdout=subprocess.PIPE) for argument in arguments]
    try:
        limit = time.monotonic() + PATIENCE
        while not all((spool / "delivered.json").exists() and tracked_offset(spool) > 2000 for spool in spools):
            assert time.monotonic() < limit, "nothing was delivered while the processes ran"
            assert all(child.poll() is None for child in children)
            time.sleep(0.05)
    finally:
        for child in children:
            child.send_signal(signal.SIGKILL)
    reported = [child.communicate()[0].splitlines(keepends=True) for child in children]

    client = mlflow.MlflowClient(database(store))
    for spool, lines in zip(spools, reported, strict=True):
        returned = len([line for line in lines if line.endswith(b"\n")])
        assert deliver(spool, PATIENCE)
        loss = history(client, spool, "loss")
        # The last call may have written its line without living to report it.
        assert len(loss) in (returned, returned + 1)
        assert loss == [(step, step / 7) for step in range(len(loss))]
        assert history(client, spool, "gap") == [(step, -step) for step in range(len(loss))]


def tracked_offset(spool: Path) -> int:
    return int(json.loads((spool / "delivered.json").read_text())["offset"])


def test_a_line_cut_short_does_not_harm_its_neighbours(store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "torn"
    tracker = start(store, spool)
    tracker.log_metrics({"loss": 0.0}, 0)
    assert tracker.finish("FAILED", wait=PATIENCE)
    with (spool / "events.jsonl").open("a") as file:
        file.write('{"metrics":{"loss":')
    client = mlflow.MlflowClient(database(store))
    tracker = start(store, spool)
    assert deliver(spool, PATIENCE)
    assert client.get_run(run_id(spool)).info.status == "RUNNING"
    tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.finish("FINISHED", wait=PATIENCE)
    assert history(client, spool, "loss") == [(0, 0.0), (1, 1.0)]


def test_what_mlflow_refuses_does_not_hold_up_the_rest(store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = tmp_path / "refused"
    tracker = start(store, spool)
    tracker.log_metrics({"loss": 0.0}, 0)
    tracker.log_metrics({"m" * 251: 0.0}, 0)
    tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.finish("FINISHED", wait=PATIENCE)
    assert history(mlflow.MlflowClient(database(store)), spool, "loss") == [(0, 0.0), (1, 1.0)]
    assert len([record for record in caplog.records if "refuses" in record.message]) == 1


def test_server_away_then_back(
    server: tuple[str, subprocess.Popen[bytes]], tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    spool = tmp_path / "away"
    tracker = Tracker(spool, f"http://user:hunter2@127.0.0.1:{free_port()}", "away", "away")
    for step in range(5):
        tracker.log_metrics({"loss": float(step), "bad": math.nan}, step)
    tracker.log_text("text", "folder/note.txt")
    limit = time.monotonic() + PATIENCE
    while not caplog.records and time.monotonic() < limit:
        time.sleep(0.05)
    assert not tracker.finish("FINISHED", wait=2.0), "it gives up, though the server stays away for good"
    warnings = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([line for line in warnings if "is away" in line]) == 1
    on_disk = "".join(path.read_text() for path in spool.rglob("*") if path.is_file())
    assert "hunter2" not in "".join(warnings) + "".join(capfd.readouterr()) + on_disk

    uri = wait_for(server)
    assert deliver(spool, PATIENCE, uri)
    client = mlflow.MlflowClient(uri)
    assert history(client, spool, "loss") == [(step, float(step)) for step in range(5)]
    assert all(math.isnan(value) for _, value in history(client, spool, "bad"))
    assert artifact(client, spool, "folder/note.txt", tmp_path) == b"text"
    assert client.get_run(run_id(spool)).info.status == "FINISHED"


def test_another_server_gets_the_whole_run(server: tuple[str, subprocess.Popen[bytes]], store: Path, tmp_path: Path) -> None:
    spool = tmp_path / "moved"
    tracker = start(store, spool)
    tracker.log_metrics({"loss": 0.0}, 0)
    assert tracker.finish("FAILED", wait=PATIENCE)
    tracker = Tracker(spool, wait_for(server), "moved", "moved")
    tracker.log_metrics({"loss": 1.0}, 1)
    assert tracker.finish("FINISHED", wait=PATIENCE)
    assert history(mlflow.MlflowClient(wait_for(server)), spool, "loss") == [(0, 0.0), (1, 1.0)]


def test_a_full_disk_costs_entries_and_one_warning(tmp_path: Path) -> None:
    """In a process whose files may hold no byte more: a disk that is full for it alone."""
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path / "full")], stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("cannot write") == 1
    lines = (tmp_path / "full" / "events.jsonl").read_text().splitlines()
    steps = [event["step"] for event in map(json.loads, filter(None, lines)) if "metrics" in event]
    assert steps == [0, 3], "what was written before and after the disk was full is kept"


def test_a_call_never_waits_for_mlflow(tmp_path: Path) -> None:
    """Where nobody answers, what is logged is on disk when the call returns."""
    tracker = Tracker(tmp_path / "cost", f"http://127.0.0.1:{free_port()}", "cost", "cost")
    for step in range(500):
        tracker.log_metrics({f"metric{index}": index / 7 for index in range(20)}, step)
    lines = (tmp_path / "cost" / "events.jsonl").read_text().splitlines()
    tracker.finish("KILLED", wait=0.0)
    assert [event["step"] for event in map(json.loads, lines) if "metrics" in event] == list(range(500))


def test_importing_and_opening_does_not_import_mlflow_on_the_calling_thread(tmp_path: Path) -> None:
    command = [sys.executable, "-c", IMPORTS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"delivered": True, "importers": ["tracking"]}


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../up", "a//b", "a/./b", "a/"])
def test_artifact_names_stay_inside_the_run(tmp_path: Path, name: str) -> None:
    tracker = Tracker(tmp_path / "names", f"sqlite:///{tmp_path}/mlflow.db", "names", "names")
    with pytest.raises(ValueError, match="relative path"):
        tracker.log_file(b"", name)
    tracker.finish("KILLED", wait=0.0)


def test_null_tracker_takes_the_same_calls() -> None:
    tracker: RunTracker = NullTracker()
    tracker.log_params({"a": "b"})
    tracker.set_tags({"a": "b"})
    tracker.log_metrics({"a": 1.0}, 0)
    tracker.log_text("a", "a")
    tracker.log_figure(Figure(), "a.png")
    tracker.log_file(b"a", "a")
    assert tracker.backlog_bytes() == 0
    assert tracker.finish("FINISHED")


def test_delivering_no_spool_is_done_at_once(tmp_path: Path) -> None:
    assert deliver(tmp_path / "nothing", 0.0)


def test_spools_with_something_left_are_found(tmp_path: Path) -> None:
    away = Tracker(tmp_path / "runs" / "a" / "tracking", f"http://127.0.0.1:{free_port()}", "waiting", "a")
    away.log_metrics({"x": 1.0}, 1)
    assert not away.finish("FINISHED", wait=0.5)
    here = Tracker(tmp_path / "runs" / "b" / "tracking", f"sqlite:///{tmp_path}/mlflow.db", "waiting", "b", str(tmp_path / "artifacts"))
    assert here.finish("FINISHED", wait=PATIENCE)
    assert waiting(tmp_path / "runs") == [tmp_path / "runs" / "a" / "tracking"]


def test_a_nested_run_waits_for_the_run_that_it_belongs_to(store: Path, tmp_path: Path) -> None:
    uri, artifacts = f"sqlite:///{store}/mlflow.db", str(store / "artifacts")
    child = Tracker(tmp_path / "child", uri, "nested", "child", artifacts, "parent/child", "parent")
    child.log_metrics({"loss": 0.5}, 1)
    assert not child.finish("FINISHED", wait=1.0)
    parent = Tracker(tmp_path / "parent", uri, "nested", "parent", artifacts, "parent")
    assert parent.finish("FINISHED", wait=PATIENCE)
    assert deliver(tmp_path / "child", PATIENCE)
    run = mlflow.MlflowClient(uri).get_run(str(run_id(tmp_path / "child")))
    assert run.data.tags["mlflow.parentRunId"] == run_id(tmp_path / "parent")
    assert (run.data.metrics, run.info.status) == ({"loss": 0.5}, "FINISHED")
