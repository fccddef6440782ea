"""The Helm chart, rendered by Helm's own library and held to Kubernetes' schemas and to the server's own settings."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.observability import metrics
from server.settings import Settings

helm = pytest.importorskip("helm_python", reason="Helm's library is not installed: pip install '.[deploy]'")
kubernetes = pytest.importorskip("kubernetes_validate", reason="Kubernetes' schemas are not installed: '.[deploy]'")

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
CHART = DEPLOY / "helm" / "lensrack"
OLDEST, NEWEST = "1.27", "1.35"  # Chart.yaml takes no older one
OPERATOR = "monitoring.coreos.com/v1"  # custom resources, whose schemas no registry here has: looked at by hand below

PLAIN: dict[str, Any] = {"redis": {"url": "redis://redis:6379/0"}, "keys": {"open": True}}
FULL: dict[str, Any] = {
    "keys": {"open": True},
    "image": {"repository": "registry.example.com/lensrack"},
    "imagePullSecrets": [{"name": "pull"}],
    "redis": {"url": "rediss://redis:6380/1", "passwordSecret": {"name": "redis", "key": "redis-password"}},
    "data": {"storageClass": "cephfs", "size": "1Ti"},
    "settings": {"backbone": "vit_base_patch16_224.augreg_in21k", "rack_bytes": 10_737_418_240, "trace_ratio": 0.1},
    "server": {
        "gpus": 1,
        "settings": {"max_batch": 64, "packed": False},
        "nodeSelector": {"gpu": "yes"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "autoscaling": {"enabled": True, "maxReplicas": 4},
    },
    "worker": {"replicas": 3, "gpus": 1, "settings": {"worker_jobs": 4}},
    "ingress": {"enabled": True, "className": "nginx", "tlsSecret": "tls", "annotations": {"a": "b"}},
    "networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}], "egress": [{"ports": [{"port": 443}]}]},
    "monitoring": {"enabled": True, "labels": {"release": "prometheus"}},
}
BARE: dict[str, Any] = {
    **PLAIN,
    "data": {"existingClaim": "mine"},
    "networkPolicy": {"enabled": False},
    "server": {"disruptionBudget": {"minAvailable": 1, "maxUnavailable": None}},
}


KEYED: dict[str, Any] = {
    **PLAIN,
    "keys": {"secret": {"name": "lensrack-keys"}, "metrics": {"name": "scraper"}},
    "monitoring": {"enabled": True},
}


@pytest.fixture(scope="module", autouse=True)
def each_schema_is_read_once() -> Iterator[None]:
    """The package reads a file of a megabyte for every document."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kubernetes.utils, "schema_contents", functools.cache(kubernetes.utils.schema_contents))
        yield


@pytest.fixture(scope="module")
def chart() -> Iterator[Any]:
    with helm.Chart.load(str(CHART)) as chart:
        yield chart


_RENDERED: dict[str, list[dict[str, Any]]] = {}


def rendered(chart: Any, values: dict[str, Any]) -> list[dict[str, Any]]:
    """The documents of a release called demo, as Helm writes them; of the same values once."""
    key = json.dumps(values, sort_keys=True)
    if key not in _RENDERED:
        chart.validate_schema(json.loads(key))
        files = chart.render(json.loads(key), name="demo", namespace="vision")
        texts = [text for path, text in files.items() if not path.endswith("NOTES.txt")]
        _RENDERED[key] = [document for text in texts for document in yaml.safe_load_all(text) if document]
    return copy.deepcopy(_RENDERED[key])


def one(documents: list[dict[str, Any]], kind: str, name: str) -> dict[str, Any]:
    (found,) = [each for each in documents if (each["kind"], each["metadata"]["name"]) == (kind, name)]
    return found


def pod(documents: list[dict[str, Any]], part: str) -> dict[str, Any]:
    return one(documents, "Deployment", f"demo-lensrack-{part}")["spec"]["template"]


def environment(template: dict[str, Any]) -> dict[str, str]:
    (container,) = template["spec"]["containers"]
    named = [entry["name"] for entry in container["env"]]
    assert len(named) == len(set(named))
    return {entry["name"]: entry["value"] for entry in container["env"]}


EVERY = pytest.mark.parametrize("values", [PLAIN, FULL, BARE, KEYED], ids=["plain", "full", "bare", "keyed"])


# --- what Helm and Kubernetes say -------------------------------------------------------------------------------------


@EVERY
def test_helm_lint_finds_nothing(values: dict[str, Any]):
    found = helm.lint(str(CHART), copy.deepcopy(values), strict=True)
    assert found["errors"] == []
    assert {message["error"] for message in found["messages"]} <= {"icon is recommended"}


@pytest.mark.parametrize(
    ("values", "version"),
    [(PLAIN, NEWEST), (FULL, OLDEST), (FULL, NEWEST), (BARE, NEWEST), (KEYED, NEWEST)],
    ids=["plain", "full, oldest", "full", "bare", "keyed"],
)
def test_every_document_is_what_kubernetes_takes(chart: Any, values: dict[str, Any], version: str):
    documents = rendered(chart, values)
    checked = [document for document in documents if document["apiVersion"] != OPERATOR]
    kinds = {document["kind"] for document in checked}
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget"}
    assert values is not FULL or kinds >= {"HorizontalPodAutoscaler", "NetworkPolicy", "Ingress"}
    for document in checked:
        kubernetes.validate(document, version, strict=True)


def test_the_schemas_would_notice(chart: Any):
    document = one(rendered(chart, PLAIN), "Deployment", "demo-lensrack-server")
    document["spec"]["template"]["spec"]["containers"][0]["readyProbe"] = {}
    with pytest.raises(kubernetes.ValidationError, match="readyProbe"):
        kubernetes.validate(document, NEWEST, strict=True)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({}, "redis.url: expected the URL of a Redis"),
        ({"redis": {"url": "redis://:secret@redis:6379"}}, "/redis/url"),
        ({"redis": {"url": "file:///data"}}, "/redis/url"),
        ({**PLAIN, "sever": {}}, "sever"),
        ({**PLAIN, "server": {"gpus": 2}}, "/server/gpus"),
        ({**PLAIN, "settings": {"LENSRACK_DTYPE": "float32"}}, "LENSRACK_DTYPE"),
        ({**PLAIN, "data": {"size": "lots"}}, "/data/size"),
    ],
)
def test_bad_values_are_refused_with_their_name(chart: Any, values: dict[str, Any], said: str):
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        rendered(chart, values)


# --- that it is lensrack which runs -----------------------------------------------------------------------------------


@EVERY
@pytest.mark.parametrize("part", ["server", "worker"])
def test_every_variable_is_a_setting_and_its_value_is_taken(
    chart: Any, values: dict[str, Any], part: str, monkeypatch: pytest.MonkeyPatch
):
    given = environment(pod(rendered(chart, values), part))
    for name, value in given.items():
        assert name.removeprefix("LENSRACK_").lower() in Settings.model_fields, name
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (str(settings.home), settings.workers, settings.log_format) == (
        "/data",
        0 if part == "server" else 1,
        "json",
    )
    if values is FULL:
        assert settings.rack_bytes == 10_737_418_240, "a whole number is not written as 1e+10"
        assert settings.trace_ratio == 0.1
        assert (settings.max_batch, settings.packed) == ((64, False) if part == "server" else (32, True))
        assert settings.device == "cuda"


def test_what_the_chart_decides_cannot_be_set_beside_it(chart: Any):
    given = environment(pod(rendered(chart, {**PLAIN, "settings": {"home": "/elsewhere", "port": 1}}), "server"))
    assert (given["LENSRACK_HOME"], given["LENSRACK_PORT"]) == ("/data", "8000")


@EVERY
@pytest.mark.parametrize("part", ["server", "worker"])
def test_a_pod_has_no_more_rights_than_it_needs(chart: Any, values: dict[str, Any], part: str):
    spec = pod(rendered(chart, values), part)["spec"]
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    writable = {mount["mountPath"] for mount in container["volumeMounts"] if not mount.get("readOnly")}
    assert writable == {"/data", "/tmp"}
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert volumes == {mount["name"] for mount in container["volumeMounts"]}


def test_the_image_runs_as_the_user_that_the_chart_names(chart: Any):
    dockerfile = DEPLOY.parent / "Dockerfile"
    if not dockerfile.exists():
        pytest.skip("there is no Dockerfile")
    user = pod(rendered(chart, PLAIN), "server")["spec"]["securityContext"]
    assert f"USER {user['runAsUser']}:{user['runAsGroup']}" in dockerfile.read_text()


def test_probes_ask_what_the_server_answers(chart: Any):
    (server,) = pod(rendered(chart, PLAIN), "server")["spec"]["containers"]
    routes = (DEPLOY.parent / "server" / "api" / "routes" / "health.py").read_text()
    ports = {port["name"] for port in server["ports"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert f'@router.get("{server[probe]["httpGet"]["path"]}"' in routes
        assert server[probe]["httpGet"]["port"] in ports
    (worker,) = pod(rendered(chart, PLAIN), "worker")["spec"]["containers"]
    given = environment(pod(rendered(chart, PLAIN), "worker"))
    assert worker["ports"] == [{"name": "metrics", "containerPort": int(given["LENSRACK_WORKER_METRICS_PORT"])}]
    assert (server["args"], worker["args"]) == (["serve"], ["work"])


def test_a_gpu_is_asked_for_with_the_image_and_the_device_that_can_use_it(chart: Any):
    for values, gpus in ((PLAIN, 0), (FULL, 1)):
        for part in ("server", "worker"):
            (container,) = pod(rendered(chart, values), part)["spec"]["containers"]
            assert container["resources"]["limits"].get("nvidia.com/gpu", 0) == gpus
            assert container["image"].endswith("-cuda") == bool(gpus)
            assert "memory" in container["resources"]["limits"]


def test_the_password_is_a_file_from_a_secret_and_nowhere_else(chart: Any):
    for part in ("server", "worker"):
        template = pod(rendered(chart, FULL), part)
        (secret,) = [volume["secret"] for volume in template["spec"]["volumes"] if "secret" in volume]
        assert secret["secretName"] == "redis"
        assert secret["defaultMode"] == 0o440
        (item,) = secret["items"]
        (mount,) = [m for m in template["spec"]["containers"][0]["volumeMounts"] if m["name"] == "redis-password"]
        assert environment(template)["LENSRACK_REDIS_PASSWORD_FILE"] == f"{mount['mountPath']}/{item['path']}"
        assert "LENSRACK_REDIS_PASSWORD_FILE" not in environment(pod(rendered(chart, PLAIN), part))


def test_api_keys_are_a_file_from_a_secret_that_servers_alone_mount(chart: Any):
    documents = rendered(chart, KEYED)
    server, worker = pod(documents, "server"), pod(documents, "worker")
    (secret,) = [volume["secret"] for volume in server["spec"]["volumes"] if volume["name"] == "keys"]
    assert (secret["secretName"], secret["defaultMode"], secret["items"][0]["key"]) == ("lensrack-keys", 0o440, "keys")
    (mount,) = [m for m in server["spec"]["containers"][0]["volumeMounts"] if m["name"] == "keys"]
    assert environment(server)["LENSRACK_KEYS_FILE"] == f"{mount['mountPath']}/{secret['items'][0]['path']}"
    assert mount["readOnly"] is True
    assert "subPath" not in mount, "what is mounted like that never changes"
    assert "LENSRACK_ALLOW_OPEN" not in environment(server)
    assert not [volume for volume in worker["spec"]["volumes"] if volume["name"] == "keys"]
    (endpoint,) = one(documents, "ServiceMonitor", "demo-lensrack-server")["spec"]["endpoints"]
    assert endpoint["authorization"] == {"credentials": {"name": "scraper", "key": "token"}}
    plain = pod(rendered(chart, PLAIN), "server")
    assert environment(plain)["LENSRACK_ALLOW_OPEN"] == "true"
    assert "LENSRACK_KEYS_FILE" not in environment(plain)
    with pytest.raises(helm.HelmError, match=re.escape("set keys.open=true if that is meant")):
        rendered(chart, {**PLAIN, "keys": {}})


# --- that the documents fit together ----------------------------------------------------------------------------------


def fits(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@EVERY
def test_selectors_find_their_pods_and_only_these(chart: Any, values: dict[str, Any]):
    documents = rendered(chart, values)
    labels = {part: pod(documents, part)["metadata"]["labels"] for part in ("server", "worker")}
    service = one(documents, "Service", "demo-lensrack")
    budget = one(documents, "PodDisruptionBudget", "demo-lensrack-server")
    for selector in (service["spec"]["selector"], budget["spec"]["selector"]["matchLabels"]):
        assert fits(selector, labels["server"])
        assert not fits(selector, labels["worker"])
    for part, own in labels.items():
        selector = one(documents, "Deployment", f"demo-lensrack-{part}")["spec"]["selector"]["matchLabels"]
        assert fits(selector, own)
        assert not any(key.endswith(("version", "chart")) for key in selector), "selectors cannot change in an upgrade"


def test_the_network_is_open_to_whom_it_is_opened_and_to_nobody_else(chart: Any):
    for values in (PLAIN, FULL):
        documents = rendered(chart, values)
        server, worker, egress = (
            one(documents, "NetworkPolicy", f"demo-lensrack-{name}")["spec"] for name in ("server", "worker", "egress")
        )
        assert [rule["ports"] for rule in server["ingress"]] == [[{"port": "http"}]]
        assert [rule["ports"] for rule in worker.get("ingress") or []] == [[{"port": "metrics"}]] * (values is FULL)
        assert all(rule["from"] for rule in server["ingress"]), "an empty list would let in everybody"
        reached = {port["port"] for rule in egress["egress"] for port in rule["ports"]}
        assert reached == {53, 6379} | ({443} if values is FULL else set())
        for part, policy in (("server", server), ("worker", worker)):
            assert fits(policy["podSelector"]["matchLabels"], pod(documents, part)["metadata"]["labels"])
            assert fits(egress["podSelector"]["matchLabels"], pod(documents, part)["metadata"]["labels"])
    assert not [document for document in rendered(chart, BARE) if document["kind"] == "NetworkPolicy"]


def test_servers_scale_by_a_metric_that_they_have(chart: Any):
    documents = rendered(chart, FULL)
    scaler = one(documents, "HorizontalPodAutoscaler", "demo-lensrack-server")["spec"]
    deployment = one(documents, "Deployment", scaler["scaleTargetRef"]["name"])
    assert "replicas" not in deployment["spec"], "an upgrade must not undo what the autoscaler did"
    (metric,) = scaler["metrics"]
    assert metric["pods"]["metric"]["name"] == "lensrack_queue_rows"
    assert metrics.QUEUE_ROWS._name == "lensrack_queue_rows"
    assert one(rendered(chart, PLAIN), "Deployment", "demo-lensrack-server")["spec"]["replicas"] == 2


def test_data_is_shared_and_outlives_the_release(chart: Any):
    claim = one(rendered(chart, FULL), "PersistentVolumeClaim", "demo-lensrack")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    assert claim["spec"]["storageClassName"] == "cephfs"
    assert claim["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    for values, name in ((FULL, "demo-lensrack"), (BARE, "mine")):
        for part in ("server", "worker"):
            claims = [
                volume["persistentVolumeClaim"]["claimName"]
                for volume in pod(rendered(chart, values), part)["spec"]["volumes"]
                if "persistentVolumeClaim" in volume
            ]
            assert claims == [name]
    assert not [document for document in rendered(chart, BARE) if document["kind"] == "PersistentVolumeClaim"]


def test_the_operator_is_told_where_metrics_are_and_gets_the_same_alerts(chart: Any):
    documents = rendered(chart, FULL)
    mine = [document for document in documents if document["apiVersion"] == OPERATOR]
    assert {document["kind"] for document in mine} == {"ServiceMonitor", "PodMonitor", "PrometheusRule"}
    assert all(document["metadata"]["labels"]["release"] == "prometheus" for document in mine)
    service = one(documents, "Service", "demo-lensrack")
    monitor = one(documents, "ServiceMonitor", "demo-lensrack-server")["spec"]
    assert fits(monitor["selector"]["matchLabels"], service["metadata"]["labels"])
    assert monitor["endpoints"][0]["port"] in {port["name"] for port in service["spec"]["ports"]}
    worker = one(documents, "PodMonitor", "demo-lensrack-worker")["spec"]
    assert fits(worker["selector"]["matchLabels"], pod(documents, "worker")["metadata"]["labels"])
    jobs = {
        monitor["endpoints"][0]["relabelings"][0]["replacement"],
        worker["podMetricsEndpoints"][0]["relabelings"][0]["replacement"],
    }
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    assert jobs == set(re.findall(r'job="(lensrack-\w+)"', str(alerts)))
    assert one(documents, "PrometheusRule", "demo-lensrack")["spec"] == alerts


def test_the_charts_copy_of_the_alerts_is_the_original():
    assert (CHART / "files" / "alerts.yml").read_bytes() == (DEPLOY / "prometheus" / "alerts.yml").read_bytes()


def test_the_ingress_leads_to_the_service(chart: Any):
    documents = rendered(chart, FULL)
    ingress = one(documents, "Ingress", "demo-lensrack")["spec"]
    (path,) = ingress["rules"][0]["http"]["paths"]
    assert path["backend"]["service"]["name"] == one(documents, "Service", "demo-lensrack")["metadata"]["name"]
    assert ingress["tls"][0]["hosts"] == [ingress["rules"][0]["host"]]
    assert not [document for document in rendered(chart, PLAIN) if document["kind"] == "Ingress"], "off by default"
