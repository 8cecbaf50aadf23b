"""What MLflow is told: the events of a spool, as calls of its client. Nothing else in the package speaks to MLflow."""

from __future__ import annotations

import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cola_dist.redact import redact
from cola_dist.spool import Delivered, Group, Spool, inside

IDENTITY_TAG = "cola_dist.identity"
PARENT_TAG = "mlflow.parentRunId"
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


class Sender:
    """Speaks to one MLflow. Made on the delivery thread, because importing MLflow takes seconds."""

    def __init__(self, uri: str, spool: Spool) -> None:
        self._client, self._refused = connect(uri)
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
        found = self._find(experiment_id, meta.identity)
        if found is not None:
            return found
        tags = {IDENTITY_TAG: meta.identity}
        if meta.parent is not None:
            parent = self._find(experiment_id, meta.parent)
            if parent is None:
                raise RuntimeError(f"the run {meta.parent} that {meta.run_name} belongs to is not there yet")
            tags[PARENT_TAG] = parent.info.run_id
        return self._client.create_run(experiment_id, tags=tags, run_name=meta.run_name)

    def _find(self, experiment_id: str, identity: str) -> Any:
        found = self._client.search_runs([experiment_id], f"tags.`{IDENTITY_TAG}` = '{identity}'", max_results=1)
        return found[0] if found else None

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


def connect(uri: str) -> tuple[Any, Any]:
    """A client that tries once, and the exception by which MLflow refuses. Imports MLflow, which takes seconds."""
    for name, value in CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    import mlflow

    # MLflow logs a stack trace for each lost connection; here an outage is one line, written by whoever asked.
    logging.getLogger("mlflow").setLevel(logging.CRITICAL)
    return mlflow.MlflowClient(tracking_uri=uri), mlflow.MlflowException


def look_in(uri: str) -> None:
    """Ask for one experiment. Raises what MLflow raises."""
    client, _ = connect(uri)
    client.search_experiments(max_results=1)


def add_to_run(uri: str, run: str, files: Mapping[str, bytes], metrics: Mapping[str, float], step: int) -> None:
    """Log ``files`` by artifact name and ``metrics`` at ``step`` to a run that exists. Raises what MLflow raises, and ValueError for a name that
    leads out of the run."""
    client, _ = connect(uri)
    from mlflow.entities import Metric

    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder, *inside(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            client.log_artifact(run, str(path), path.parent.relative_to(folder).as_posix())
    points = [Metric(_name(name), value, int(1000 * time.time()), step) for name, value in metrics.items()]
    for start in range(0, len(points), METRICS_PER_CALL):
        client.log_batch(run, metrics=points[start : start + METRICS_PER_CALL])


def _name(name: str) -> str:
    """``name`` in the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
