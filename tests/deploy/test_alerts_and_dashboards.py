"""The files that Prometheus and Grafana are given: whole, consistent, and about metrics that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import Metric

from server.observability import metrics
from tests.deploy.dashboards import ALERTS, DASHBOARDS, DEPLOY, PROMETHEUS_OWN, Asked, alerts, dashboards, panels

EVERYTHING = [*alerts(), *panels()]


def families() -> dict[str, Metric]:
    """By every name under which it can be asked for."""
    found: dict[str, Metric] = {}
    for family in metrics.REGISTRY.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        found |= {family.name + suffix: family for suffix in suffixes}
    return found


def label_names(name: str) -> set[str]:
    family = families()[name].name
    (metric,) = [each for each in vars(metrics).values() if getattr(each, "_name", None) == family] or [None]
    return set(getattr(metric, "_labelnames", ()))


@pytest.mark.parametrize("asked", EVERYTHING, ids=lambda asked: asked.where)
def test_every_metric_and_label_that_is_asked_for_is_one_that_the_server_names(asked: Asked):
    known = families()
    own = set(PROMETHEUS_OWN)
    for name, matchers in asked.selectors:
        assert name in known, f"{asked.where}: there is no metric {name}"
        own |= label_names(name)
        for label, _, _ in matchers:
            assert label in label_names(name) | PROMETHEUS_OWN, f"{asked.where}: {name} has no label {label}"
    assert asked.grouped_by <= own, asked.where
    assert asked.shown <= own, asked.where
    assert asked.selectors or "up{" in asked.expr, f"{asked.where} asks for nothing of ours"


def test_every_metric_is_on_a_dashboard_or_in_an_alert():
    """What nobody looks at need not be counted."""
    looked_at = {families()[name].name for asked in EVERYTHING for name, _ in asked.selectors}
    ours = {family.name for family in metrics.REGISTRY.collect() if family.name.startswith("lensrack_")}
    assert ours - looked_at == {"lensrack_build_info"}


def test_what_must_not_go_unnoticed_has_an_alert():
    watched = " ".join(asked.expr for asked in alerts())
    for what in ("queue_oldest_seconds", "status=~", "0.99", 'state="failed"', "store_up", 'up{job="lensrack-worker"}'):
        assert what in watched
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            assert rule["labels"]["severity"] in {"critical", "warning"}
            assert set(rule["annotations"]) == {"summary", "action"}, "what it is, and what to do"


def test_dashboards_are_provisioned_with_the_data_source_that_they_name():
    provisioning = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert DASHBOARDS
    for dashboard in dashboards():
        used = re.findall(r'"type": "prometheus", "uid": "([^"]+)"', str(dashboard).replace("'", '"'))
        assert used
        assert set(used) == {source["uid"]}
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(ids) == len(set(ids))
        for panel in dashboard["panels"]:
            place = panel["gridPos"]
            assert place["x"] + place["w"] <= 24
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "lensrack.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/etc/grafana/dashboards"


@pytest.mark.parametrize(
    "files", [["check", "rules", "alerts.yml"], ["check", "config", "prometheus.yml"]], ids=" ".join
)
def test_promtool_takes_what_is_written(files: list[str]):
    promtool(*files)


def test_alerts_fire_when_they_should_and_only_then():
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_seen_firing_by_those_tests():
    cases = (DEPLOY / "prometheus" / "alerts_test.yml").read_text()
    assert {asked.where for asked in alerts()} == set(re.findall(r'alertname="(\w+)"', cases))


def promtool(*arguments: str, folder: Path = DEPLOY / "prometheus") -> None:
    binary = shutil.which("promtool")
    if binary is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run([binary, *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
