"""A proxy before a real S3 server that fails as networks and busy servers do, on request or by a seeded share of requests."""

from __future__ import annotations

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

from tests.s3 import S3

SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"


class Faulty:
    """A running proxy: ``plan`` holds modes for the next requests ("" passes), then ``share`` gives each mode its probability.

    ``busy``: 503; ``reset``: the connection ends before the server sees the request; ``lost``: after it did; ``reset_body`` and ``truncate``:
    half of the answer's body, then a reset or a plain end; ``hang`` and ``hang_body``: silence at once or after half of the body;
    ``trickle``: the body in small pieces; ``whole``: the server ignores the range that was asked for.
    """

    def __init__(self, server: S3) -> None:
        self.server = server
        self.plan: deque[str] = deque()
        self.share: Mapping[str, float] = {}
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        """(method, path, headers with lower-case names) of every request."""
        self.done: Counter[str] = Counter()
        """How often each mode was used; "" counts what passed."""
        self.sent = 0
        """Bytes of bodies sent to the client."""
        self.over = threading.Event()
        self._random, self._lock, self._socket = random.Random(0), threading.Lock(), self._listen(0)
        self.port = int(self._socket.server_address[1])
        self.endpoint = f"http://127.0.0.1:{self.port}"

    def reset(self) -> None:
        """As new, on the same port."""
        self.plan.clear()
        self.seen.clear()
        self.done.clear()
        self.share, self.sent = {}, 0
        self._random.seed(0)
        if self.over.is_set():
            self._reopen()

    def mode(self, handler: BaseHTTPRequestHandler) -> str:
        """Note a request and draw what happens to it."""
        with self._lock:
            self.seen.append((handler.command, handler.path, {name.lower(): value for name, value in handler.headers.items()}))
            if self.plan:
                mode = self.plan.popleft()
            else:
                draw, mode = self._random.random(), ""
                for name, share in self.share.items():
                    mode, draw = (name if 0 <= draw < share else mode), draw - share
            self.done[mode] += 1
            return mode

    def refuse(self, seconds: float) -> None:
        """Nobody listens on the port for that long."""
        self.close()
        timer = threading.Timer(seconds, self._reopen)
        timer.daemon = True
        timer.start()

    def close(self) -> None:
        """Nobody listens on the port any more, and what is under way is dropped."""
        self.over.set()
        self._socket.shutdown()
        self._socket.server_close()

    def _reopen(self) -> None:
        self.over.clear()
        self._socket = self._listen(self.port)

    def _listen(self, port: int) -> ThreadingHTTPServer:
        handler = type("Handler", (_Handler,), {"proxy": self})
        server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server


class _Handler(BaseHTTPRequestHandler):
    proxy: Faulty
    protocol_version = "HTTP/1.1"

    def handle_any(self) -> None:
        mode = "reset" if self.proxy.over.is_set() else self.proxy.mode(self)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if mode == "reset":
            self._reset()
        elif mode == "hang":
            self._hang()
        elif mode == "busy":
            self._answer(503, [("Content-Type", "application/xml"), ("Content-Length", str(len(SLOW_DOWN)))], SLOW_DOWN)
        else:
            status, headers, data = self._forward(body, mode)
            if mode == "lost":
                self._reset()
            else:
                self._answer(status, headers, data, mode)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

    def _forward(self, body: bytes, mode: str) -> tuple[int, list[tuple[str, str]], bytes]:
        if mode == "whole":
            data = (self.proxy.server.root / urlsplit(self.path).path[1:]).read_bytes()
            return 200, [("Content-Length", str(len(data)))], data
        upstream = http.client.HTTPConnection(urlsplit(self.proxy.server.endpoint).netloc, timeout=30)
        # The signature covers the host name that the client used: it stays.
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                upstream.putheader(name, value)
        upstream.endheaders(body or None)
        answer = upstream.getresponse()
        data = answer.read()
        headers = [
            (name, value)
            for name, value in answer.getheaders()
            if name.lower() not in ("connection", "transfer-encoding", "content-length")
        ]
        length = str(len(data)) if self.command != "HEAD" else answer.getheader("Content-Length", "0")
        upstream.close()
        return answer.status, [*headers, ("Content-Length", length)], data

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes, mode: str = "") -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = data[: len(data) // 2]
        if mode == "trickle":
            for start in range(0, len(data), len(data) // 20 + 1):
                self._send(data[start : start + len(data) // 20 + 1])
                time.sleep(0.02)
        elif mode in ("reset_body", "truncate", "hang_body"):
            self._send(half)
            if mode == "reset_body":
                self._reset()
            elif mode == "hang_body":
                self._hang()
            self.close_connection = True
        else:
            self._send(data)

    def _send(self, data: bytes) -> None:
        try:
            for start in range(0, len(data), 2**16):
                self.wfile.write(data[start : start + 2**16])
                self.proxy.sent += len(data[start : start + 2**16])
        except OSError:  # the client had enough
            self.close_connection = True

    def _hang(self) -> None:
        self.proxy.over.wait(30)
        self.close_connection = True

    def _reset(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.rfile.close()
        self.connection.close()

    def finish(self) -> None:
        with suppress(OSError, ValueError):
            super().finish()

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def before(server: S3) -> Iterator[Faulty]:
    """A proxy before ``server`` until the block ends."""
    proxy = Faulty(server)
    try:
        yield proxy
    finally:
        proxy.close()
