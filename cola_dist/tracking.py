"""The one door to MLflow. Training writes to a spool on disk; a thread carries the spool to MLflow.

Every call of a ``Tracker`` appends one line (or one file) to its spool and returns. The thread sends the spool in order, so a
tracking server that is slow or away costs training nothing and loses nothing:

- The position delivered so far is stored after each group that MLflow confirmed. A kill in between sends that group once more, and
  a second delivery changes nothing: metrics carry the time of the call and MLflow's database keys a point by
  (run, name, time, step, value); parameters keep their first value; tags, files and the status overwrite themselves with themselves.
- The MLflow run carries the spool's identity as a tag and is looked up by it before one is created, so a restart continues the run.
- MLflow is imported on the thread, at its first delivery: it takes seconds, during which it shares the interpreter lock.
"""

from __future__ import annotations

import io
import logging
import math
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from cola_dist.redact import HIDDEN, redact, without_credentials
from cola_dist.sender import METRICS_PER_CALL, Sender, add_to_run, look_in
from cola_dist.spool import Meta, Spool, SpoolWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]

DELIVERY_INTERVAL = 2.0
"""Seconds between two deliveries: MLflow's Python work shares the interpreter lock with training, so it is done in batches."""
LONGEST_BACKOFF = 60.0
"""Seconds between two attempts at most while MLflow is away."""
CLOSING_PAUSE = 0.5
"""Seconds between two attempts once somebody waits for the end of the run."""

_log = logging.getLogger("cola_dist.tracking")


class RunTracker(Protocol):
    """What training code may say about a run. ``Tracker`` says it to MLflow, ``NullTracker`` to nobody."""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Record parameters. MLflow keeps a parameter's first value; a later, different one becomes the tag ``changed/NAME``."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags; a later value replaces an earlier one."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record one point per metric. NaN stays NaN; ±inf is sent as NaN, which MLflow would store as ±1.8e308."""

    def log_text(self, text: str, name: str) -> None:
        """Keep ``text`` as the artifact ``name`` (a relative path such as ``config/resolved.yaml``)."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """Draw a matplotlib figure as PNG and keep it as the artifact ``name``. Drawing takes the caller's time (~0.1 s)."""

    def log_file(self, data: bytes, name: str) -> None:
        """Keep ``data`` as the artifact ``name``; its suffix tells MLflow how to show it (``.mp4``, ``.png``, ``.json``)."""

    def backlog_bytes(self) -> int:
        """Bytes of this run's events that MLflow has not confirmed yet, files not counted."""

    def finish(self, status: Status, wait: float = 30.0) -> bool:
        """End the run. True if all of it reached MLflow within ``wait`` seconds; what did not stays in the spool."""


class NullTracker:
    """The tracker of every rank but 0: takes the same calls and keeps nothing."""

    def log_params(self, params: Mapping[str, str]) -> None:
        """Do nothing."""

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_text(self, text: str, name: str) -> None:
        """Do nothing."""

    def log_figure(self, figure: Figure, name: str) -> None:
        """Do nothing."""

    def log_file(self, data: bytes, name: str) -> None:
        """Do nothing."""

    def backlog_bytes(self) -> int:
        """Nothing waits."""
        return 0

    def finish(self, status: Status, wait: float = 30.0) -> bool:
        """Do nothing; nothing remains to be delivered."""
        return True


class Tracker:
    """Tracks one run through ``spool``, a folder on this machine that belongs to the run and to one writer at a time.

    Opening a spool that exists continues its MLflow run. ``uri`` is any MLflow tracking URI. ``artifacts`` is where the experiment
    keeps files, used only when this run is the first of the experiment. ``identity`` is what the run is found by in MLflow; give one
    that is stored with the run (its folder, its checkpoint) where a restart may come up on a machine that does not see the spool.
    ``parent`` is the identity of a run of the same experiment that this one is shown inside of; until MLflow has that one, entries wait.
    """

    def __init__(
        self,
        spool: Path,
        uri: str,
        experiment: str,
        run_name: str,
        artifacts: str | None = None,
        identity: str | None = None,
        parent: str | None = None,
    ) -> None:
        self._spool = folder = Spool(spool)
        self._writer = SpoolWriter(folder)
        known = folder.meta()
        identity = identity or (known.identity if known else uuid.uuid4().hex)
        folder.write_meta(Meta(_without_credentials(uri), experiment, run_name, artifacts, identity, parent))
        self._writer.append({"status": "RUNNING"})
        self._courier = _Courier(folder, uri)
        self._courier.start()

    def log_params(self, params: Mapping[str, str]) -> None:
        """See ``RunTracker``."""
        self._writer.append({"params": {name: redact(value) for name, value in params.items()}})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See ``RunTracker``."""
        self._writer.append({"tags": {name: redact(value) for name, value in tags.items()}})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See ``RunTracker``."""
        self._writer.append({"metrics": {name: float(value) for name, value in metrics.items()}, "step": int(step)})

    def log_text(self, text: str, name: str) -> None:
        """See ``RunTracker``."""
        self.log_file(redact(text).encode(), name)

    def log_figure(self, figure: Figure, name: str) -> None:
        """See ``RunTracker``."""
        image = io.BytesIO()
        figure.savefig(image, format="png")
        self.log_file(image.getvalue(), name)

    def log_file(self, data: bytes, name: str) -> None:
        """See ``RunTracker``. Raises ValueError if ``name`` is not a relative path inside the run."""
        self._writer.add_file(data, name)

    def backlog_bytes(self) -> int:
        """See ``RunTracker``."""
        return self._spool.backlog_bytes()

    def finish(self, status: Status, wait: float = 30.0) -> bool:
        """See ``RunTracker``. The tracker takes no calls afterwards."""
        self._writer.append({"status": status})
        self._writer.close()
        return self._courier.finish(wait)


def deliver(spool: Path, timeout: float, uri: str | None = None) -> bool:
    """Deliver what remains in a spool, within ``timeout`` seconds. True if nothing remains, also when ``spool`` does not exist.

    ``uri`` is needed where the tracking URI holds credentials, which the spool does not keep; by default the spool's own is used.
    """
    folder = Spool(spool)
    meta = folder.meta()
    if meta is None:
        return True
    courier = _Courier(folder, uri or meta.uri)
    courier.start()
    return courier.finish(timeout)


def attach(
    uri: str, run: str, files: Mapping[str, bytes], metrics: Mapping[str, float] | None = None, step: int = 0, wait: float = 30.0
) -> str:
    """Keep ``files`` by artifact name, and ``metrics`` as points at ``step``, in a run that MLflow has, whose status stays as it is.

    Returns why that failed, or nothing.
    """
    database = database_of(uri)
    if database is not None and not database.is_file():
        # MLflow would make an empty one.
        return f"no database {database}"
    return _within(wait, uri, lambda: add_to_run(uri, run, files, metrics or {}, step))


def reach(uri: str, wait: float = 30.0) -> str:
    """Ask MLflow for one experiment. Returns why that failed, or nothing; a database file that is not there yet is no failure."""
    database = database_of(uri)
    if database is not None and not database.is_file():
        return ""
    return _within(wait, uri, lambda: look_in(uri))


def _within(wait: float, uri: str, work: Callable[[], None]) -> str:
    """Do ``work``, which speaks to MLflow at ``uri``, for at most ``wait`` seconds. Returns why it failed, or nothing."""
    reason = [f"MLflow at {redact(uri)} gave no answer within {wait:g} s"]

    def attempt() -> None:
        try:
            work()
            reason[0] = ""
        except Exception as error:  # MLflow's clients raise anything; the caller may go on without it
            reason[0] = redact(f"MLflow at {uri}: {error}").split("\n")[0][:300]

    thread = threading.Thread(target=attempt, name="mlflow", daemon=True)
    thread.start()
    thread.join(wait)
    return reason[0]


def database_of(uri: str) -> Path | None:
    """The file of a tracking URI ``sqlite:///FILE``; none for another."""
    path = uri.removeprefix("sqlite:///")
    return None if path == uri else Path(path)


def waiting(runs: Path) -> list[Path]:
    """Spools ``RUN/tracking`` below ``runs`` that hold something MLflow has not got."""
    folders = (Spool(path) for path in sorted(runs.glob("*/tracking")))
    return [folder.folder for folder in folders if next(folder.groups(folder.delivered().offset, 1), None) is not None]


def run_id(spool: Path) -> str | None:
    """MLflow's id of the spool's run; None while the run was not created yet."""
    return Spool(spool).delivered().run_id


def _without_credentials(uri: str) -> str:
    return without_credentials(uri).replace(f"://{HIDDEN}@", "://")


class _Courier:
    """Carries a spool to MLflow on a thread of its own."""

    def __init__(self, spool: Spool, uri: str) -> None:
        self._spool = spool
        self._uri = uri
        self._closing = threading.Event()
        self._deadline = math.inf
        self._away = False
        self._done = False
        self._sender: Sender | None = None
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, wait: float) -> bool:
        """Deliver the rest within ``wait`` seconds and end the thread; one that hangs in a call is left behind as a daemon."""
        self._deadline = time.monotonic() + wait
        self._closing.set()
        self._thread.join(wait)
        if not self._done:
            _log.warning("tracking: not all of %s reached MLflow; it is kept, open the run again to deliver it", self._spool.folder)
        return self._done

    def _run(self) -> None:
        pause = DELIVERY_INTERVAL
        while time.monotonic() < self._deadline:
            closing = self._closing.wait(pause)
            try:
                complete = self._deliver()
            except Exception as error:  # MLflow's clients raise anything; whatever it is, the spool keeps the data and tries again
                complete = False
                pause = min(LONGEST_BACKOFF, 2 * pause)
                self._warn_away(error)
            else:
                pause = DELIVERY_INTERVAL
                self._away = False
            if closing:
                if complete:
                    self._done = True
                    return
                time.sleep(CLOSING_PAUSE)

    def _warn_away(self, error: Exception) -> None:
        if not self._away:
            reason = (redact(str(error)).strip() or type(error).__name__).split("\n")[0][:300]
            _log.warning("tracking: MLflow at %s is away (%s); entries wait in %s", redact(self._uri), reason, self._spool.folder)
        self._away = True

    def _deliver(self) -> bool:
        """Send what lies in the spool now. True if that is delivered, False if somebody else is delivering it."""
        with self._spool.exclusive() as held:
            if not held:
                return False
            delivered = self._spool.delivered()
            if next(self._spool.groups(delivered.offset, METRICS_PER_CALL), None) is None:
                return True
            if self._sender is None:
                self._sender = Sender(self._uri, self._spool)
            delivered = self._sender.open_run(delivered)
            for group in self._spool.groups(delivered.offset, METRICS_PER_CALL):
                self._sender.send(group)
                delivered = replace(delivered, offset=group.end)
                self._spool.write_delivered(delivered)
                self._spool.remove_files(group)
            return True
