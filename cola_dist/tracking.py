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
import os
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from cola_dist.spool import Delivered, Group, Meta, Spool, SpoolWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Status = Literal["FINISHED", "FAILED", "KILLED"]

DELIVERY_INTERVAL = 2.0
"""Seconds between two deliveries: MLflow's Python work shares the interpreter lock with training, so it is done in batches."""
LONGEST_BACKOFF = 60.0
"""Seconds between two attempts at most while MLflow is away."""
CLOSING_PAUSE = 0.5
"""Seconds between two attempts once somebody waits for the end of the run."""
IDENTITY_TAG = "cola_dist.identity"
# MLflow refuses more than this many entries in one log_batch call.
METRICS_PER_CALL = 1000
ENTRIES_PER_CALL = 100
# MLflow's own retries hold a call to a dead server for minutes; the spool retries instead.
CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

_log = logging.getLogger("cola_dist.tracking")


def redact(text: str) -> str:
    """``text`` without the credentials of any URI in it: ``user:password@`` and the values of password-like query fields."""
    text = re.sub(r"://\S*@", "://***@", text)
    return re.sub(r"(?i)([?&][\w-]*(?:password|token|secret|key)=)[^&\s]+", r"\1***", text)


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

    def finish(self, status: Status, wait: float = 30.0) -> bool:
        """Do nothing; nothing remains to be delivered."""
        return True


class Tracker:
    """Tracks one run through ``spool``, a folder on this machine that belongs to the run and to one writer at a time.

    Opening a spool that exists continues its MLflow run. ``uri`` is any MLflow tracking URI. ``artifacts`` is where the experiment
    keeps files, used only when this run is the first of the experiment. ``identity`` is what the run is found by in MLflow; give one
    that is stored with the run (its folder, its checkpoint) where a restart may come up on a machine that does not see the spool.
    """

    def __init__(
        self, spool: Path, uri: str, experiment: str, run_name: str, artifacts: str | None = None, identity: str | None = None
    ) -> None:
        folder = Spool(spool)
        self._writer = SpoolWriter(folder)
        known = folder.meta()
        identity = identity or (known.identity if known else uuid.uuid4().hex)
        folder.write_meta(Meta(_without_credentials(uri), experiment, run_name, artifacts, identity))
        self._writer.append({"status": "RUNNING"})
        self._courier = _Courier(folder, uri)
        self._courier.start()

    def log_params(self, params: Mapping[str, str]) -> None:
        """See ``RunTracker``."""
        self._writer.append({"params": dict(params)})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """See ``RunTracker``."""
        self._writer.append({"tags": dict(tags)})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """See ``RunTracker``."""
        self._writer.append({"metrics": {name: float(value) for name, value in metrics.items()}, "step": int(step)})

    def log_text(self, text: str, name: str) -> None:
        """See ``RunTracker``."""
        self.log_file(text.encode(), name)

    def log_figure(self, figure: Figure, name: str) -> None:
        """See ``RunTracker``."""
        image = io.BytesIO()
        figure.savefig(image, format="png")
        self.log_file(image.getvalue(), name)

    def log_file(self, data: bytes, name: str) -> None:
        """See ``RunTracker``. Raises ValueError if ``name`` is not a relative path inside the run."""
        self._writer.add_file(data, name)

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


def waiting(runs: Path) -> list[Path]:
    """Spools ``RUN/tracking`` below ``runs`` that hold something MLflow has not got."""
    folders = (Spool(path) for path in sorted(runs.glob("*/tracking")))
    return [folder.folder for folder in folders if next(folder.groups(folder.delivered().offset, 1), None) is not None]


def run_id(spool: Path) -> str | None:
    """MLflow's id of the spool's run; None while the run was not created yet."""
    return Spool(spool).delivered().run_id


def _without_credentials(uri: str) -> str:
    return re.sub(r"://\S*@", "://", uri)


class _Courier:
    """Carries a spool to MLflow on a thread of its own."""

    def __init__(self, spool: Spool, uri: str) -> None:
        self._spool = spool
        self._uri = uri
        self._closing = threading.Event()
        self._deadline = math.inf
        self._away = False
        self._done = False
        self._sender: _Sender | None = None
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
                self._sender = _Sender(self._uri, self._spool)
            delivered = self._sender.open_run(delivered)
            for group in self._spool.groups(delivered.offset, METRICS_PER_CALL):
                self._sender.send(group)
                delivered = replace(delivered, offset=group.end)
                self._spool.write_delivered(delivered)
                self._spool.remove_files(group)
            return True


class _Sender:
    """Speaks to one MLflow. Made on the delivery thread, because importing MLflow takes seconds."""

    def __init__(self, uri: str, spool: Spool) -> None:
        for name, value in CLIENT_SETTINGS.items():
            os.environ.setdefault(name, value)
        import mlflow

        # MLflow logs a stack trace for each lost connection; here an outage is one line, written by the courier.
        logging.getLogger("mlflow").setLevel(logging.CRITICAL)
        self._client = mlflow.MlflowClient(tracking_uri=uri)
        self._refused: Any = mlflow.MlflowException
        self._spool = spool
        self._run_id = ""
        self._params: dict[str, str] = {}

    def open_run(self, delivered: Delivered) -> Delivered:
        """Find the spool's run or create it. A server that never saw the run (another URI than before) gets all of the spool."""
        run = self._get_run(delivered.run_id) if delivered.run_id else None
        if run is None:
            run = self._find_or_create_run()
            delivered = Delivered(run.info.run_id, 0)
            self._spool.write_delivered(delivered)
        self._run_id = run.info.run_id
        self._require_active(run)
        self._params = dict(run.data.params)
        return delivered

    def send(self, group: Group) -> None:
        """Send a group. What MLflow refuses for good (a name it does not take) is left out with a warning."""
        try:
            self._send(group.events)
        except self._refused as error:
            if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                raise
            self._require_active(self._get_run(self._run_id))
            if len(group.events) > 1:
                for event in group.events:
                    self.send(Group([event]))
            else:
                _log.warning("tracking: MLflow refuses an entry, it is left out: %s", redact(str(error)).split("\n")[0][:300])

    def _get_run(self, run_id: str) -> Any:
        try:
            return self._client.get_run(run_id)
        except self._refused as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    def _require_active(self, run: Any) -> None:
        if run is None or run.info.lifecycle_stage != "active":
            raise RuntimeError(f"run {self._run_id} was deleted; restore it in MLflow to have it continued")

    def _find_or_create_run(self) -> Any:
        meta = self._spool.meta()
        if meta is None:
            raise RuntimeError(f"{self._spool.folder} holds no meta.json: not a tracking spool")
        experiment = self._client.get_experiment_by_name(meta.experiment)
        if experiment is None:
            experiment_id = self._client.create_experiment(meta.experiment, artifact_location=meta.artifacts)
        else:
            experiment_id = experiment.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{meta.identity}'", max_results=1)
        return found[0] if found else self._client.create_run(experiment_id, tags={IDENTITY_TAG: meta.identity}, run_name=meta.run_name)

    def _send(self, events: list[dict[str, Any]]) -> None:
        if "metrics" in events[0]:
            self._send_metrics(events)
        for event in events:
            if "params" in event:
                self._send_params(event["params"])
            elif "tags" in event:
                self._send_tags(event["tags"])
            elif "file" in event and (self._spool.folder / event["file"]).exists():
                self._client.log_artifact(self._run_id, str(self._spool.folder / event["file"]), event["folder"] or None)
            elif "status" in event:
                self._send_status(event["status"], event["time"])

    def _send_metrics(self, events: list[dict[str, Any]]) -> None:
        from mlflow.entities import Metric

        points = [
            Metric(_name(name), value if math.isfinite(value) else math.nan, event["time"], event["step"])
            for event in events
            for name, value in event["metrics"].items()
        ]
        for start in range(0, len(points), METRICS_PER_CALL):
            self._client.log_batch(self._run_id, metrics=points[start : start + METRICS_PER_CALL])

    def _send_params(self, params: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        named = {_name(name): str(value) for name, value in params.items()}
        new = [Param(name, value) for name, value in named.items() if name not in self._params]
        for start in range(0, len(new), ENTRIES_PER_CALL):
            self._client.log_batch(self._run_id, params=new[start : start + ENTRIES_PER_CALL])
        self._send_tags({f"changed/{name}": value for name, value in named.items() if self._params.setdefault(name, value) != value})

    def _send_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        entries = [RunTag(_name(name), str(value)) for name, value in tags.items()]
        for start in range(0, len(entries), ENTRIES_PER_CALL):
            self._client.log_batch(self._run_id, tags=entries[start : start + ENTRIES_PER_CALL])

    def _send_status(self, status: str, time_ms: int) -> None:
        if status == "RUNNING":
            self._client.update_run(self._run_id, status=status)
        else:
            self._client.set_terminated(self._run_id, status, end_time=time_ms)


def _name(name: str) -> str:
    """``name`` in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
