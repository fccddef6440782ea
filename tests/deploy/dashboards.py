"""What `deploy/prometheus` and `deploy/grafana` ask of Prometheus: every expression, its metrics and their labels."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
ALERTS = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
PROMETHEUS_OWN = {"job", "instance", "le", "alertname", "alertstate", "severity"}

_SELECTOR = re.compile(r"\b((?:lensrack|process)_\w+)(\{[^}]*\})?")
_MATCHER = re.compile(r'(\w+)\s*(=~|!~|!=|=)\s*"([^"]*)"')
_GROUPING = re.compile(r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)")
_TEMPLATED = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


@dataclass(frozen=True)
class Asked:
    """An expression, where it stands, and the texts that are filled from its labels."""

    where: str
    expr: str
    texts: tuple[str, ...] = ()

    @property
    def selectors(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """Names of metrics, each with its matchers (label, operator, value)."""
        return [(name, _MATCHER.findall(braces)) for name, braces in _SELECTOR.findall(self.expr)]

    @property
    def grouped_by(self) -> set[str]:
        return {label.strip() for group in _GROUPING.findall(self.expr) for label in group.split(",")}

    @property
    def shown(self) -> set[str]:
        return {label for text in self.texts for label in _TEMPLATED.findall(text)}

    def concrete(self) -> str:
        """As Grafana sends it, for all instances."""
        return self.expr.replace("$__rate_interval", "1m").replace("$instance", ".*")


def alerts() -> Iterator[Asked]:
    for group in yaml.safe_load(ALERTS.read_text())["groups"]:
        for rule in group["rules"]:
            yield Asked(rule["alert"], rule["expr"], tuple(rule["annotations"].values()))


def panels() -> Iterator[Asked]:
    for file in DASHBOARDS:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel.get("targets", ()):
                yield Asked(f"{file.stem}: {panel['title']}", target["expr"], (target["legendFormat"],))


def dashboards() -> list[dict[str, Any]]:
    return [json.loads(file.read_text()) for file in DASHBOARDS]
