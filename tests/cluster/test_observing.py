"""The Grafana dashboard, Prometheus' rules and its configuration: whole, in PromQL, and about metrics that Ray really exports."""

from __future__ import annotations

import json
import re
import socket
import time
import urllib.request
from collections.abc import Iterator

import pytest
import yaml

from cola_dist.train.meters import GAUGES
from tests.cluster.templates import CLUSTER, documents

DASHBOARD = json.loads((CLUSTER / "grafana" / "dashboard.json").read_text())
RULES = yaml.safe_load((CLUSTER / "prometheus" / "alerts.yaml").read_text())
PROMETHEUS = yaml.safe_load((CLUSTER / "prometheus" / "prometheus.yaml").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ALERTS = RULES["groups"][0]["rules"]
# What Grafana puts for its variable; PromQL itself has no `$`.
EXPRESSIONS = [(panel["title"], target["expr"].replace("$run", ".*")) for panel in PANELS for target in panel["targets"]]
EXPRESSIONS += [(alert["alert"], alert["expr"]) for alert in ALERTS]
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used"}
"""Machines without GPUs export none of these."""
EXPORTED_WITHIN_S = 90.0


def metrics_of(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


def labels_of(expression: str) -> set[str]:
    """Labels that series are grouped by."""
    return {label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")}


@pytest.mark.parametrize(("where", "expression"), EXPRESSIONS, ids=[f"{where}-{i}" for i, (where, _) in enumerate(EXPRESSIONS)])
def test_every_expression_is_promql(where: str, expression: str) -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed: pip install -e '.[dev]'")
    parser.parse(expression)


def test_a_wrong_expression_is_found() -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed: pip install -e '.[dev]'")
    for wrong in ("max by (run (ray_cola_step)", "rate(ray_cola_step)", 'ray_cola_step{run=~"$run"', "maximum(ray_cola_step)"):
        with pytest.raises(ValueError):  # noqa: PT011 its messages say where, and differ by version
            parser.parse(wrong)


def test_the_dashboard_can_be_imported() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert {name: variable["type"] for name, variable in variables.items()} == {"datasource": "datasource", "run": "query"}
    assert variables["run"]["query"]["query"] == "label_values(ray_cola_step, run)"
    assert "id" not in DASHBOARD, "a number of another Grafana"
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(numbers)
    rows = [panel["title"] for panel in DASHBOARD["panels"] if panel["type"] == "row"]
    assert rows == ["Is it alive", "Speed", "Loss", "Reliability", "Machine"]
    for panel in PANELS:
        assert panel["description"].endswith(".")
        for source in (panel["datasource"], *(target["datasource"] for target in panel["targets"])):
            assert source == {"type": "prometheus", "uid": "${datasource}"}
        for target in panel["targets"]:
            of_runs = [name for name in metrics_of(target["expr"]) if name.startswith("ray_cola_")]
            assert target["expr"].count('{run=~"$run"}') == len(re.findall(r"\bray_cola_", target["expr"])), "the run is chosen everywhere"
            assert not of_runs or "run" in labels_of(target["expr"])


def test_panels_stand_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + dx, at["y"] + dy) for dx in range(at["w"]) for dy in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells


def test_every_metric_of_a_run_is_shown() -> None:
    shown = set().union(*(metrics_of(target["expr"]) for panel in PANELS for target in panel["targets"]))
    told = set().union(*(metrics_of(alert["expr"]) for alert in ALERTS))
    assert {f"ray_cola_{name}" for name in GAUGES} | {"ray_cola_clips_skipped_total"} <= shown | told


def test_alerts_are_rules_and_say_what_to_do() -> None:
    assert [alert["alert"] for alert in ALERTS] == [
        *("ColaCollapsed", "ColaDataStall", "ColaSlowStep", "ColaRestarts", "ColaCheckpointOld", "ColaSilent", "ColaGone")
    ]
    for alert in ALERTS:
        assert alert.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smhd]", alert.get("for", "0s"))
        assert alert["labels"]["severity"] in ("warning", "critical")
        assert alert["annotations"].keys() == {"summary", "description"}
        assert "{{ $labels.run }}" in alert["annotations"]["summary"]


def test_prometheus_loads_the_rules_and_finds_what_the_manifests_name() -> None:
    assert [CLUSTER / "prometheus" / name for name in PROMETHEUS["rule_files"]] == [CLUSTER / "prometheus" / "alerts.yaml"]
    machines, pods = PROMETHEUS["scrape_configs"]
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    assert machines["file_sd_configs"] == [{"files": [f"/tmp/ray/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]}]
    (cluster,) = documents(CLUSTER / "kuberay" / "raycluster.yaml")
    ((name, port),) = {
        (port["name"], port["containerPort"])
        for group in [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
        for port in group["template"]["spec"]["containers"][0]["ports"]
        if port["containerPort"] == int(group["rayStartParams"]["metrics-export-port"])
    }
    (keep,) = pods["relabel_configs"]
    assert (keep["action"], keep["regex"]) == ("keep", f"{cluster['metadata']['name']};{name}")
    assert pods["kubernetes_sd_configs"][0]["namespaces"] == {"names": [cluster["metadata"]["namespace"]]}
    (policy,) = [one for one in documents(CLUSTER / "kuberay" / "network.yaml") if one["metadata"]["name"] == "ray-metrics"]
    assert policy["spec"]["ingress"][0]["ports"] == [{"protocol": "TCP", "port": port}]


@pytest.fixture(scope="module")
def scraped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What a real Ray session exports while an actor says everything that a run can say: the label sets of each metric."""

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Clusters of single jobs, which other tests start in this process, leave it off.
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_enable_metrics_collection", raising=False)
        yield from listen(port)


def listen(port: int) -> Iterator[dict[str, list[str]]]:
    import ray

    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        _metrics_export_port=port,
        _system_config={"metrics_report_interval_ms": 1000},
    )

    class Speaker:
        def __init__(self) -> None:
            from cola_dist.train.meters import RayMeters

            self.meters = RayMeters("tiny-1")
            self.meters.enter("joint")
            self.meters.show(dict.fromkeys(GAUGES, 2.0))
            self.meters.skipped({("robot", "checksum"): 3.0})
            self.meters.skipped({("robot", "checksum"): 5.0})

        def speaks(self) -> bool:
            return True

    try:
        speaker = ray.remote(num_cpus=0)(Speaker).remote()
        assert ray.get(speaker.speaks.remote())
        deadline, wanted = time.monotonic() + EXPORTED_WITHIN_S, set().union(*(metrics_of(e) for _, e in EXPRESSIONS)) - OF_GPUS
        found: dict[str, list[str]] = {}
        while not wanted <= found.keys() and time.monotonic() < deadline:
            time.sleep(1)
            found = scrape(port)
        yield found
    finally:
        ray.shutdown()


def scrape(port: int) -> dict[str, list[str]]:
    try:
        page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    except OSError:  # not up yet
        return {}
    found: dict[str, list[str]] = {}
    for name, series in re.findall(r"^(\w+)(\{.*)$", page, re.MULTILINE):
        found.setdefault(name, []).append(series)
    return found


@pytest.mark.ray
def test_ray_exports_what_dashboard_and_rules_ask_for(scraped: dict[str, list[str]]) -> None:
    from ray.dashboard.modules.reporter.reporter_agent import METRICS_GAUGES

    for where, expression in EXPRESSIONS:
        for name in metrics_of(expression):
            if name in OF_GPUS:
                assert name.removeprefix("ray_") in METRICS_GAUGES
                continue
            assert name in scraped, f"{where}: Ray exports no {name}"
            for label in labels_of(expression):
                assert all(re.search(rf'[{{,]{label}="', series) for series in scraped[name]), f"{where}: {name} has no label {label}"
    verdict = scraped["ray_cola_verdict"]
    assert len(verdict) == 1
    assert {'run="tiny-1"', 'phase="joint"'} <= set(re.split("[{},]", verdict[0]))
    assert verdict[0].endswith(" 2.0")
    assert scraped["ray_cola_clips_skipped_total"][0].endswith(" 5.0"), "totals are counted once"
