"""The manifests for KubeRay: against its published schemas and Kubernetes', against Ray's own reading of them, and among themselves."""

from __future__ import annotations

import copy
import json
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay import autoscaling_config

from tests.cluster.templates import CLUSTER, JOBS_IN_IMAGE, documents, parse_job_command

FOLDER = CLUSTER / "kuberay"
FILES = sorted(FOLDER.glob("*.yaml"))
OBJECTS = [(path.name, document) for path in FILES for document in documents(path) if document["kind"] != "Kustomization"]
RAY = [(name, document) for name, document in OBJECTS if document["apiVersion"].startswith("ray.io/")]
PLAIN = [(name, document) for name, document in OBJECTS if not document["apiVersion"].startswith("ray.io/")]
SECRETS = {"cola-ray-token", "cola-storage"}
KUBERNETES = "1.37"


def the(kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for _, document in OBJECTS if (document["kind"], document["metadata"]["name"]) == (kind, name)]
    return found


def name_of(value: Any) -> str:
    return f"{value['kind']}-{value['metadata']['name']}" if "kind" in value else value if isinstance(value, str) else ""


def schema_of(kind: str) -> Any:
    """The published schema, closed: the API server drops fields that it does not know, which here is an error."""
    path = Path(__file__).parent / "crds" / f"{kind.lower()}s.json"

    def close(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("properties"), dict) and "additionalProperties" not in node and node.get("type") == "object":
                node["additionalProperties"] = node.get("x-kubernetes-preserve-unknown-fields", False)
            for item in node.values():
                close(item)
        elif isinstance(node, list):
            for item in node:
                close(item)

    schema = json.loads(path.read_text())
    del schema["properties"]["metadata"]  # the CRD says of it only that it is an object
    close(schema)
    return schema


@pytest.mark.parametrize(("name", "document"), RAY, ids=name_of)
def test_kuberay_knows_every_field(name: str, document: dict[str, Any]) -> None:
    body = {key: value for key, value in document.items() if key != "metadata"}
    schema = schema_of(document["kind"])
    jsonschema.Draft7Validator.check_schema(schema)
    assert [f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(schema).iter_errors(body)] == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "enableInTreeAutoscaler"), True),
        (("spec", "workerGroupSpecs", 0, "minReplica"), 0),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "containers", 0, "envfrom"), []),
        (("spec", "autoscalerOptions", "version"), "v3"),
        (("spec", "authOptions", "mode"), "tokens"),
    ],
)
def test_a_wrong_field_is_found(where: tuple[Any, ...], value: Any) -> None:
    document = copy.deepcopy(the("RayCluster", "cola"))
    del document["metadata"]
    place: Any = document
    for step in where[:-1]:
        place = place[step]
    place[where[-1]] = value
    assert len(list(jsonschema.Draft7Validator(schema_of("RayCluster")).iter_errors(document))) == 1


@pytest.mark.parametrize(("name", "document"), PLAIN, ids=name_of)
def test_kubernetes_knows_every_field(name: str, document: dict[str, Any]) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: pip install -e '.[dev]'")
    validate.validate(document, KUBERNETES, strict=True)


def test_pods_in_ray_objects_are_pods_to_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed: pip install -e '.[dev]'")
    for where, spec in pods():
        validate.validate({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": where}, "spec": spec}, KUBERNETES, strict=True)


def pods() -> list[tuple[str, dict[str, Any]]]:
    """Every pod that the manifests describe."""
    cluster = the("RayCluster", "cola")["spec"]
    found = [("head", cluster["headGroupSpec"]["template"]["spec"])]
    found += [(group["groupName"], group["template"]["spec"]) for group in cluster["workerGroupSpecs"]]
    found += [(d["metadata"]["name"], d["spec"]["submitterPodTemplate"]["spec"]) for _, d in RAY if d["kind"] == "RayJob"]
    found += [(d["metadata"]["name"], d["spec"]["template"]["spec"]) for _, d in PLAIN if d["kind"] == "Deployment"]
    return found


@pytest.mark.parametrize(("where", "spec"), pods(), ids=name_of)
def test_pods_are_what_the_restricted_standard_asks_for(where: str, spec: dict[str, Any]) -> None:
    pod = spec["securityContext"]
    assert pod["runAsNonRoot"] is True
    assert pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
    assert not [volume for volume in spec.get("volumes", []) if "hostPath" in volume]
    # The head's autoscaler speaks to Kubernetes; nobody else has anything to say to it.
    assert spec.get("automountServiceAccountToken", True) is (where == "head")
    for container in spec["containers"]:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["resources"]["requests"].keys() >= {"cpu", "memory"}
        assert "memory" in container["resources"]["limits"]


def test_all_is_in_one_namespace_that_enforces_the_standard() -> None:
    assert {document["metadata"].get("namespace", "cola") for _, document in OBJECTS} == {"cola"}
    assert the("Namespace", "cola")["metadata"]["labels"] == {"pod-security.kubernetes.io/enforce": "restricted"}


def test_names_that_are_referred_to_are_there() -> None:
    settings = {document["metadata"]["name"] for _, document in PLAIN if document["kind"] == "ConfigMap"}
    claims = {document["metadata"]["name"] for _, document in PLAIN if document["kind"] == "PersistentVolumeClaim"}
    secrets = {the("RayCluster", "cola")["spec"]["authOptions"]["secretName"]}
    for _, spec in pods():
        for container in spec["containers"]:
            for source in container.get("envFrom", []):
                if "configMapRef" in source:
                    assert source["configMapRef"]["name"] in settings
                else:
                    secrets.add(source["secretRef"]["name"])
            assert not [one for one in container.get("env", []) if "value" in one and re.search("(?i)key|token|password", one["name"])]
        assert {v["persistentVolumeClaim"]["claimName"] for v in spec.get("volumes", [])} <= claims
    assert secrets == SECRETS
    assert not [document for _, document in OBJECTS if document["kind"] == "Secret"], "a Secret in a file is no secret"
    text = (CLUSTER / "README.md").read_text()
    assert all(f"create secret generic {name}" in text for name in SECRETS)


def test_kustomize_takes_all_but_the_jobs() -> None:
    (kustomization,) = documents(FOLDER / "kustomization.yaml")
    jobs = {name for name, document in RAY if document["kind"] == "RayJob"}
    assert set(kustomization["resources"]) == {path.name for path in FILES} - jobs - {"kustomization.yaml"}
    assert jobs == {"rayjob-cotrain.yaml", "rayjob-sweep.yaml"}
    (image,) = kustomization["images"]
    used = {container["image"] for _, spec in pods() for container in spec["containers"]}
    assert used == {f"{image['name']}:{image['newTag']}"}


def selected(policy: dict[str, Any], labels: dict[str, str]) -> bool:
    return policy["spec"]["podSelector"].get("matchLabels", {}).items() <= labels.items()


def test_the_dashboard_is_open_to_ray_to_submitters_and_to_the_operator_alone() -> None:
    head = {"ray.io/cluster": "cola", "ray.io/node-type": "head"}
    policies = [document for _, document in PLAIN if document["kind"] == "NetworkPolicy"]
    assert {"podSelector": {}, "policyTypes": ["Ingress"]} in [policy["spec"] for policy in policies], "without it all is open"
    rules = [rule for policy in policies if selected(policy, head) for rule in policy["spec"].get("ingress", [])]
    assert all(rule["from"] for rule in rules)
    assert not [peer for rule in rules for peer in rule["from"] if "ipBlock" in peer]
    # A rule without ports is one for all of them.
    to_dashboard = [rule for rule in rules if 8265 in [port["port"] for port in rule.get("ports", [{"port": 8265}])]]
    peers = [peer for rule in to_dashboard for peer in rule["from"]]
    assert peers == [
        {"podSelector": {"matchLabels": {"ray.io/cluster": "cola"}}},
        {"podSelector": {"matchLabels": {"ray.io/originated-from-crd": "RayJob"}}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        },
    ]
    doors = [document for _, document in PLAIN if document["kind"] in ("Ingress", "Gateway", "HTTPRoute")]
    doors += [document for _, document in PLAIN if document.get("spec", {}).get("type") in ("NodePort", "LoadBalancer")]
    assert doors == []


def test_services_and_policies_find_their_pods() -> None:
    labels = the("Deployment", "mlflow")["spec"]["template"]["metadata"]["labels"]
    assert the("Deployment", "mlflow")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert the("Service", "mlflow")["spec"]["selector"].items() <= labels.items()
    assert selected(the("NetworkPolicy", "mlflow"), labels)


def test_mlflow_knows_its_options_and_answers_to_the_name_that_jobs_use() -> None:
    from mlflow.cli import server

    (container,) = the("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["mlflow", "server"]
    context = server.make_context("server", list(container["args"]), resilient_parsing=True)
    for _, document in RAY:
        if document["kind"] == "RayJob":
            uri = re.search(r"--tracking.uri http://(\S+)", document["spec"]["entrypoint"])
            assert uri is not None
            assert uri[1] in context.params["allowed_hosts"].split(",")
            assert uri[1] == f"mlflow:{the('Service', 'mlflow')['spec']['ports'][0]['port']}"


def test_rays_autoscaler_reads_what_was_meant() -> None:
    derived = autoscaling_config._derive_autoscaling_config_from_ray_cr(the("RayCluster", "cola"))
    types = derived["available_node_types"]
    resources = {name: {kind: node["resources"].get(kind, 0) for kind in ("CPU", "GPU")} for name, node in types.items()}
    assert resources == {"headgroup": {"CPU": 0, "GPU": 0}, "gpu": {"CPU": 1, "GPU": 1}, "data": {"CPU": 8, "GPU": 0}}
    assert {name: (node["min_workers"], node["max_workers"]) for name, node in types.items()} == {
        "headgroup": (0, 0),
        "gpu": (0, 8),
        "data": (0, 4),
    }
    assert (types["gpu"]["labels"], types["data"]["labels"]) == ({"cola-role": "train"}, {"cola-role": "data"})
    assert derived["idle_timeout_minutes"] == 5


def test_ray_is_of_the_installed_version_and_asks_for_the_token() -> None:
    spec = the("RayCluster", "cola")["spec"]
    assert spec["rayVersion"] == ray.__version__
    assert spec["authOptions"]["mode"] == "token"
    assert spec["autoscalerOptions"]["version"] == "v2"


@pytest.mark.parametrize(("name", "document"), [pair for pair in RAY if pair[1]["kind"] == "RayJob"], ids=name_of)
def test_jobs_know_their_options_and_fit_the_cluster(name: str, document: dict[str, Any]) -> None:
    spec = document["spec"]
    words = shlex.split(spec["entrypoint"])
    assert words[1].startswith(JOBS_IN_IMAGE)
    parse_job_command(words)
    assert spec["clusterSelector"] == {"ray.io/cluster": the("RayCluster", "cola")["metadata"]["name"]}
    assert spec["backoffLimit"] == 0, "KubeRay takes no other value beside a clusterSelector"
    (gpu,) = [group for group in the("RayCluster", "cola")["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    workers = int(words[words.index("--train.workers") + 1])
    at_once = int(words[words.index("--concurrent") + 1]) if "--concurrent" in words else 1
    assert workers * at_once <= gpu["maxReplicas"]


def test_lists_are_lists_and_strings_are_strings() -> None:
    """YAML turns a bare 1 or yes into something that no environment variable can be."""
    assert all(isinstance(value, str) for value in the("ConfigMap", "cola-settings")["data"].values())
    assert yaml.safe_load((FOLDER / "settings.yaml").read_text())["data"]["COLA_CLUSTER_PATIENCE_S"] == "1800"
