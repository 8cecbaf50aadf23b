"""What is looked at on one node, by a process there. Needs no accelerator and takes none."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import random
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cola_dist import storage, tracking
from cola_dist.data.shards import open_folder, read_member

SCRATCH_BYTES = 16 * 2**20
_SHM = Path("/dev/shm")
_SPILL = "RAY_object_spilling_directory"


@dataclass(frozen=True)
class Facts:
    """What a node is like. Sizes are in bytes."""

    python: str
    versions: dict[str, str]
    """Of each distribution that was asked for and is there."""
    code: str
    """Hash of this project's own sources."""
    gpus: tuple[str, ...]
    """Name of each, as the driver tells."""
    driver: str
    auth: str
    """``RAY_AUTH_MODE`` of Ray's processes."""
    free: dict[str, int]
    """Free bytes of the file system of each folder."""
    shm: int | None
    """Size of ``/dev/shm``; none where there is no such thing."""
    open_files: int


@dataclass(frozen=True)
class Stored:
    """How fast object storage or a file system was, MB/s and seconds."""

    write: float
    read: float
    list_s: float
    delete_s: float


class Probe:
    """Runs as an actor on one node."""

    def facts(self, distributions: Sequence[str], folders: Sequence[str]) -> Facts:
        """What the node is like; of ``folders`` on its disks, how much is free."""
        gpus, driver = _gpus()
        shm = shutil.disk_usage(_SHM).total if _SHM.is_dir() else None
        free = {folder: shutil.disk_usage(_existing(Path(folder))).free for folder in (*_own_folders(), *folders)}
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        auth = os.environ.get("RAY_AUTH_MODE", "")
        return Facts(platform.python_version(), _versions(distributions), _code(), gpus, driver, auth, free, shm, limit)

    def now(self) -> float:
        """This node's clock, seconds since 1970."""
        return time.time()

    def store(self, folder: str, name: str, theirs: str, sha256: str) -> Stored:
        """Read what the driver wrote as ``theirs``, then write, read, list and delete a file of one's own. Raises what goes wrong."""
        began = time.perf_counter()
        if hashlib.sha256(storage.read_bytes(storage.join(folder, theirs))).hexdigest() != sha256:
            raise OSError(f"{storage.join(folder, theirs)} is not what was written there")
        read_s = time.perf_counter() - began
        write_s = write_scratch(storage.join(folder, name))[1]
        began = time.perf_counter()
        if not {name, theirs} <= storage.list_files(folder).keys():
            raise OSError(f"a listing of {folder} lacks what was just written there")
        listed = time.perf_counter()
        storage.delete(storage.join(folder, name))
        deleted = time.perf_counter()
        if storage.exists(storage.join(folder, name)):
            raise OSError(f"{storage.join(folder, name)} is still there after it was deleted")
        megabytes = SCRATCH_BYTES / 1e6
        return Stored(megabytes / write_s, megabytes / read_s, listed - began, deleted - listed)

    def data(self, folder: str) -> tuple[int, float]:
        """Open a shard folder and read a clip. Returns its episodes, and how long that took."""
        began = time.perf_counter()
        opened = open_folder(folder)
        read_member(opened, opened.episodes[0], "mp4")
        return len(opened.episodes), time.perf_counter() - began

    def mlflow(self, uri: str) -> str:
        """Why MLflow at ``uri`` cannot be reached from here, or nothing."""
        return tracking.reach(uri)


def write_scratch(uri: str) -> tuple[str, float]:
    """Write a file that does not compress. Returns its sha256, and how long writing took."""
    data = random.Random(uri).randbytes(SCRATCH_BYTES)
    began = time.perf_counter()
    storage.write_bytes(uri, data)
    return hashlib.sha256(data).hexdigest(), time.perf_counter() - began


def _own_folders() -> list[str]:
    """Where checkpoints are put together, and where Ray writes what its object store has no room for."""
    spill = os.environ.get(_SPILL) or str(Path(os.environ.get("RAY_TMPDIR") or "/tmp") / "ray")
    return list(dict.fromkeys((tempfile.gettempdir(), spill)))


def _existing(path: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def _versions(distributions: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _code() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _gpus() -> tuple[tuple[str, ...], str]:
    """Names and driver as the driver's own tool tells: Ray hides GPUs from processes that have not asked for any."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return (), ""
    lines = [line.rpartition(",") for line in text.splitlines() if line.strip()]
    return tuple(name.strip() for name, _, _ in lines), ", ".join(sorted({driver.strip() for _, _, driver in lines}))
