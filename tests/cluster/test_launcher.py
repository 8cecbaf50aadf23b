"""The files of Ray's cluster launcher, through Ray's own schema, preparation and scheduler. No cloud is asked anything."""

from __future__ import annotations

import json
import re
from typing import Any

import botocore.session
import botocore.validate
import pytest
import ray
from ray.autoscaler._private.aws import config as aws
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.event_logger import AutoscalerEventLogger
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.instance_manager.subscribers.cloud_resource_monitor import CloudResourceMonitor
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.instance_manager_pb2 import Instance, InstanceUpdateEvent

from tests.cluster.templates import CLUSTER, documents, parse_ray_command, shell_commands

CLOUDS = ("aws", "gcp")
ALL = (*CLOUDS, "local")
WORKER, READER = {"CPU": 1, "GPU": 1}, {"CPU": 1}


def load(name: str) -> dict[str, Any]:
    (config,) = documents(CLUSTER / f"{name}.yaml")
    prepared: dict[str, Any] = prepare_config(config)
    validate_config(prepared)
    return prepared


def launched(name: str, demand: list[dict[str, float]], recovered: dict[str, float] | None = None, **limits: int) -> dict[str, int]:
    """How many nodes of each type autoscaler v2 would launch for ``demand`` beside a cluster of nothing."""
    config = load(name)
    for node_type, most in limits.items():
        config["available_node_types"][node_type.replace("_", "-")]["max_workers"] = most
    autoscaling = AutoscalingConfig(config, skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs={
            kind: node for kind, node in autoscaling.get_node_type_configs().items() if kind != autoscaling.get_head_node_type()
        },
        max_num_nodes=autoscaling.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count([ResourceRequestUtil.make(bundle) for bundle in demand]),
        recoverable_resource_availabilities=recovered or {},
    )
    reply = ResourceDemandScheduler(AutoscalerEventLogger(_Silent())).schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


class _Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.mark.parametrize("name", ALL)
def test_ray_takes_the_file(name: str) -> None:
    config = load(name)
    nodes = AutoscalingConfig(config, skip_content_hash=True).get_node_type_configs()
    head = nodes.pop(config["head_node_type"])
    assert head.resources["CPU"] == 0
    assert {node.min_worker_nodes for node in nodes.values()} == {0}
    assert {node.labels["cola-role"] for node in nodes.values()} == {"train", "data"}


@pytest.mark.parametrize("name", ALL)
def test_ray_refuses_a_field_that_it_does_not_know(name: str) -> None:
    config = load(name)
    config["idle_timeout"] = 5
    with pytest.raises(Exception, match="idle_timeout"):
        validate_config(config)


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_of_rays_defaults_runs_on_the_nodes(name: str) -> None:
    config = load(name)
    commands = [command for key, value in config.items() if key.endswith("_commands") for command in value]
    assert not [command for command in commands if "ray-wheels" in command or "0.0.0.0" in command]
    assert all(command.startswith(("ray ", "pip install 'google-api")) for command in commands), commands
    assert config["provider"].get("cache_stopped_nodes") is (False if name == "aws" else None)


@pytest.mark.parametrize("name", CLOUDS)
def test_start_commands_are_rays_own_and_the_dashboard_is_not_open(name: str) -> None:
    config = load(name)
    starts = [command for role in ("head", "worker") for command in config[f"{role}_start_ray_commands"]]
    words = [found for command in starts for found in shell_commands(command, "ray")]
    assert [found[1] for found in words] == ["stop", "start", "stop", "start"]
    for found in words:
        parse_ray_command(found)
    assert "--dashboard-host=127.0.0.1" in words[1]
    assert "-e RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert {option.split("=")[0] for option in config["docker"]["run_options"]} >= {"-e RAY_AUTH_TOKEN_PATH"}
    (token,) = [option.split("=")[1] for option in config["docker"]["run_options"] if "RAY_AUTH_TOKEN_PATH" in option]
    assert token.rpartition("/")[0] in config["file_mounts"]


@pytest.mark.parametrize("name", CLOUDS)
def test_a_run_gets_spot_nodes_and_a_data_node(name: str) -> None:
    assert launched(name, [WORKER] * 3 + [READER]) == {"gpu-spot": 3, "data": 1}


@pytest.mark.parametrize("name", CLOUDS)
def test_what_spot_may_not_hold_goes_on_demand(name: str) -> None:
    assert launched(name, [WORKER] * 3, gpu_spot=1) == {"gpu-spot": 1, "gpu-on-demand": 2}
    assert launched(name, [WORKER] * 3, {"gpu-spot": 0.0}) == {"gpu-on-demand": 3}


@pytest.mark.parametrize("name", ALL)
def test_reading_starts_no_gpu_node(name: str) -> None:
    assert set(launched(name, [READER] * 4)) == {"data"}


def test_a_refused_launch_does_not_lower_a_type() -> None:
    """What the comments in aws.yaml and gcp.yaml say of Ray. Where this fails Ray has got better, and they can promise more."""
    monitor = CloudResourceMonitor()
    monitor.notify([InstanceUpdateEvent(instance_type="gpu-spot", new_instance_status=Instance.ALLOCATION_FAILED)])
    assert monitor.get_recoverable_resource_availabilities() == {}
    monitor.notify([InstanceUpdateEvent(instance_type="gpu-spot", new_instance_status=Instance.ALLOCATION_TIMEOUT)])
    assert monitor.get_recoverable_resource_availabilities() == {"gpu-spot": 0.0}


def test_aws_is_prepared_but_for_what_only_aws_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    def key_pair(config: dict[str, Any]) -> dict[str, Any]:
        config["auth"]["ssh_private_key"] = "~/.ssh/key.pem"
        return config

    for step in ("_configure_subnet", "_configure_security_group"):
        monkeypatch.setattr(aws, step, lambda config: config)
    monkeypatch.setattr(aws, "_configure_key_pair", key_pair)
    for asks in ("_client", "_resource"):
        monkeypatch.setattr(aws, asks, lambda *_: pytest.fail("a step asks AWS"))
    config = aws.bootstrap_aws(load("aws"))
    nodes = config["available_node_types"]
    assert all(node["node_config"]["ImageId"].startswith("ami-") for node in nodes.values())
    assert config["head_node"] == {}, "Ray would give the head its own role with access to all of EC2 and S3"
    profiles = {name: node["node_config"]["IamInstanceProfile"]["Name"] for name, node in nodes.items()}
    assert profiles == {"head": "cola-head", "gpu-spot": "cola-worker", "gpu-on-demand": "cola-worker", "data": "cola-worker"}


@pytest.mark.parametrize("node_type", ["head", "gpu-spot", "gpu-on-demand", "data"])
def test_aws_would_understand_the_node(node_type: str) -> None:
    """Against the API's own model of RunInstances, as botocore would check it before it sends anything."""
    node = load("aws")["available_node_types"][node_type]["node_config"]
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    request = {**node, "MinCount": 1, "MaxCount": 1}
    assert not botocore.validate.ParamValidator().validate(request, model.input_shape).has_errors()
    request["InstanceTyp"] = "m7i.xlarge"
    assert botocore.validate.ParamValidator().validate(request, model.input_shape).has_errors()
    assert node["MetadataOptions"]["HttpTokens"] == "required"
    assert all(disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"])
    assert ("InstanceMarketOptions" in node) is (node_type == "gpu-spot")


def statements(name: str) -> list[dict[str, Any]]:
    policy = json.loads((CLUSTER / "iam" / name).read_text())
    assert policy["Version"] == "2012-10-17"
    found: list[dict[str, Any]] = policy["Statement"]
    return found


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@pytest.mark.parametrize("name", sorted(path.name for path in (CLUSTER / "iam").glob("*.json")))
def test_policies_allow_no_more_than_they_name(name: str) -> None:
    for statement in statements(name):
        assert statement["Effect"] == "Allow"
        assert not {"NotAction", "NotResource", "NotPrincipal"} & set(statement)
        actions = listed(statement["Action"])
        assert not [action for action in actions if "*" in action]
        if "Principal" in statement:
            assert statement["Principal"] == {"Service": "ec2.amazonaws.com"}
        elif "*" in listed(statement["Resource"]):
            assert all(action.startswith("ec2:Describe") for action in actions), f"{statement['Sid']} changes what it does not name"


def test_the_head_starts_and_ends_instances_of_its_own_cluster_alone() -> None:
    cluster = load("aws")["cluster_name"]
    by_action: dict[str, list[dict[str, Any]]] = {}
    for statement in statements("head-ec2.json"):
        for action in listed(statement["Action"]):
            by_action.setdefault(action, []).append(statement)
    changing = {action for action in by_action if not action.startswith("ec2:Describe")}
    assert changing == {"ec2:RunInstances", "ec2:CreateTags", "ec2:TerminateInstances", "iam:PassRole"}
    for action in changing:
        for statement in by_action[action]:
            if any("instance/" in resource or ":role/" in resource for resource in listed(statement["Resource"])):
                assert statement["Condition"], f"{statement['Sid']} holds for all instances"
    tags = {value for statement in statements("head-ec2.json") for value in _tag_values(statement)}
    assert tags == {cluster}
    (passed,) = by_action["iam:PassRole"]
    assert passed["Resource"] == "arn:aws:iam::*:role/cola-worker"


def _tag_values(statement: dict[str, Any]) -> list[str]:
    equals = statement.get("Condition", {}).get("StringEquals", {})
    return [value for key, value in equals.items() if key.endswith("/ray-cluster-name")]


def test_the_data_bucket_is_read_only() -> None:
    writes = [s for s in statements("storage.json") if any(re.search(r":(Put|Delete|Abort)", action) for action in listed(s["Action"]))]
    assert [listed(statement["Resource"]) for statement in writes] == [["arn:aws:s3:::my-runs-bucket/*"]]


def test_the_launchers_roles_on_google_cloud_are_those_that_are_listed() -> None:
    source = (CLUSTER / "iam" / "gcp-roles.yaml").read_text()
    code = ray.__path__[0] + "/autoscaler/_private/gcp/config.py"
    with open(code) as file:
        (block,) = re.findall(r"DEFAULT_SERVICE_ACCOUNT_ROLES = \[(.*?)\]", file.read(), re.DOTALL)
    (roles,) = documents(CLUSTER / "iam" / "gcp-roles.yaml")
    of_head = [grant["role"] for grant in roles["ray-autoscaler-sa-v1@my-project.iam.gserviceaccount.com"]]
    assert of_head == re.findall(r'"(roles/[\w.]+)"', block), source
