"""The Kubernetes manifests: sound by the API's own schemas, and in agreement with each other and with the proxy."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.packaging.conftest import ROOT
from tlsproxy.config import Config
from tlsproxy.config_yaml import load_config
from tlsproxy.metrics import FAMILIES

DIRECTORY = ROOT / "configs/kubernetes"
OLDEST_VERSION = "1.30"
"""With the preStop action `sleep`; kustomization.yaml says the same."""
KUSTOMIZATION = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())
SELECTOR = {"app.kubernetes.io/name": "tlsproxy"}


# Not the Prometheus operator's own schema, but what its API reference (monitoring.coreos.com/v1) says of the fields
# used here. Any other field fails.
SERVICE_MONITOR = {
    "type": "object",
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "monitoring.coreos.com/v1"},
        "kind": {"const": "ServiceMonitor"},
        "metadata": {"type": "object"},
        "spec": {
            "type": "object",
            "required": ["endpoints", "selector"],
            "additionalProperties": False,
            "properties": {
                "selector": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"matchLabels": {"type": "object", "additionalProperties": {"type": "string"}}},
                },
                "endpoints": {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "additionalProperties": False,
                        "properties": {
                            "port": {"type": "string"},
                            "path": {"type": "string"},
                            "interval": {"type": "string", "pattern": r"^(\d+(ms|[smhdwy]))+$"},
                        },
                    },
                },
            },
        },
    },
}


def _manifests() -> dict[str, dict[str, Any]]:
    documents = [
        document
        for file in KUSTOMIZATION["resources"]
        for document in yaml.safe_load_all((DIRECTORY / file).read_text())
    ]
    return {f"{document['kind']}/{document['metadata']['name']}": document for document in documents}


MANIFESTS = _manifests()
POD = MANIFESTS["Deployment/tlsproxy"]["spec"]["template"]
(CONTAINER,) = POD["spec"]["containers"]
PORTS = {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(str(DIRECTORY / "config.yaml"))


@pytest.mark.parametrize("version", [OLDEST_VERSION, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("name", [name for name in MANIFESTS if not name.startswith("ServiceMonitor/")])
def test_a_manifest_follows_the_schema_of_its_kind(name: str, version: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], version, strict=True)


def test_the_schema_check_finds_an_unknown_field() -> None:
    damaged = {**MANIFESTS["PodDisruptionBudget/tlsproxy"], "spec": {"maxUnavailible": 1}}
    with pytest.raises(kubernetes_validate.ValidationError, match="maxUnavailible"):
        kubernetes_validate.validate(damaged, OLDEST_VERSION, strict=True)


def test_the_service_monitor_has_the_documented_fields() -> None:
    jsonschema.validate(MANIFESTS["ServiceMonitor/tlsproxy"], SERVICE_MONITOR)


def test_every_file_is_part_of_the_whole() -> None:
    named = {*KUSTOMIZATION["resources"], *KUSTOMIZATION["configMapGenerator"][0]["files"]}
    named |= {"kustomization.yaml", "prometheus-adapter-values.yaml"}
    assert {file.name for file in DIRECTORY.iterdir()} == named


def test_selectors_find_the_pods() -> None:
    spec = {name: manifest.get("spec", {}) for name, manifest in MANIFESTS.items()}
    assert POD["metadata"]["labels"] == SELECTOR
    assert [
        spec["Deployment/tlsproxy"]["selector"]["matchLabels"],
        spec["Service/tlsproxy"]["selector"],
        spec["Service/tlsproxy-admin"]["selector"],
        spec["PodDisruptionBudget/tlsproxy"]["selector"]["matchLabels"],
        spec["NetworkPolicy/tlsproxy"]["podSelector"]["matchLabels"],
    ] == [SELECTOR] * 5


def test_the_service_monitor_finds_the_admin_service_alone() -> None:
    wanted = MANIFESTS["ServiceMonitor/tlsproxy"]["spec"]["selector"]["matchLabels"].items()
    services = [name for name, manifest in MANIFESTS.items() if name.startswith("Service/")]
    found = [name for name in services if wanted <= MANIFESTS[name]["metadata"]["labels"].items()]
    assert found == ["Service/tlsproxy-admin"]


def test_ports_are_those_the_proxy_listens_on(config: Config) -> None:
    assert config.admin is not None
    assert {"https": config.listeners[0].address.port, "admin": config.admin.address.port} == PORTS
    policy = MANIFESTS["NetworkPolicy/tlsproxy"]["spec"]
    assert [rule["ports"] for rule in policy["ingress"]] == [[{"port": name}] for name in PORTS]
    upstream_ports = {server.address.port for upstream in config.upstreams for server in upstream.servers}
    assert upstream_ports <= {port["port"] for rule in policy["egress"] for port in rule["ports"]}


def test_every_path_the_configuration_names_is_mounted_or_in_the_image(config: Config) -> None:
    mounts = {mount["mountPath"]: mount["name"] for mount in CONTAINER["volumeMounts"]}
    volumes = {volume["name"] for volume in POD["spec"]["volumes"]}
    assert set(mounts.values()) == volumes
    (token,) = config.hsm.tokens
    (certificate,) = config.certificates
    assert token.pin_file is not None
    assert mounts[str(token.pin_file.parent)] == "pin"
    assert mounts[str(certificate.chain_file.parent)] == "chains"
    assert mounts[str(config.runtime_dir.parent)] == "runtime"
    assert mounts[CONTAINER["args"][-1]] == "config"


def test_secrets_are_closed_to_others() -> None:
    secrets = [volume["secret"] for volume in POD["spec"]["volumes"] if "secret" in volume]
    assert {secret["secretName"] for secret in secrets} == {"tlsproxy-pin", "tlsproxy-pkcs11"}
    assert all(secret["defaultMode"] & 0o007 == 0 for secret in secrets)
    assert not [manifest for manifest in MANIFESTS.values() if manifest["kind"] == "Secret"]


def test_connections_have_time_to_finish(config: Config) -> None:
    pause_s = CONTAINER["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert POD["spec"]["terminationGracePeriodSeconds"] > pause_s + config.drain_timeout_s


def test_the_autoscaler_asks_for_a_metric_the_adapter_makes_of_one_there_is() -> None:
    (metric,) = MANIFESTS["HorizontalPodAutoscaler/tlsproxy"]["spec"]["metrics"]
    values = yaml.safe_load((DIRECTORY / "prometheus-adapter-values.yaml").read_text())
    (rule,) = values["rules"]["custom"]
    assert rule["name"]["as"] == metric["pods"]["metric"]["name"]
    for query in (rule["seriesQuery"], rule["metricsQuery"]):
        name = re.search(r"tlsproxy_\w+", query)
        assert name is not None
        assert name[0] in FAMILIES
    used = set(re.findall(r"(\w+)=\"", rule["metricsQuery"]))
    assert used <= set(FAMILIES["tlsproxy_handshakes_total"].label_names)


def test_as_many_proxy_workers_as_cores_are_asked_for(config: Config) -> None:
    assert CONTAINER["resources"]["requests"]["cpu"] == str(config.workers)


def test_file_names_in_the_instructions_are_those_of_the_volumes() -> None:
    text = (DIRECTORY / "kustomization.yaml").read_text()
    names = re.findall(r"create (?:secret generic|configmap) ([\w-]+)", text)
    used = {
        volume.get("secret", {}).get("secretName") or volume.get("configMap", {}).get("name")
        for volume in POD["spec"]["volumes"]
    }
    generated = {generator["name"] for generator in KUSTOMIZATION["configMapGenerator"]}
    assert {*names} == used - generated - {None}


def test_the_image_runs_as_the_user_of_the_pod() -> None:
    user = re.search(r"^USER (\d+):(\d+)$", Path(ROOT, "configs/container/Containerfile").read_text(), re.MULTILINE)
    assert user is not None
    context = POD["spec"]["securityContext"]
    assert (int(user[1]), int(user[2])) == (context["runAsUser"], context["runAsGroup"])
