"""What an engine tells front ends of its backbone, in JSON."""

from __future__ import annotations

import pytest

from server.app.backbone import BackboneInfo
from server.engine import backbone


@pytest.fixture(scope="module")
def facts() -> BackboneInfo:
    return BackboneInfo.of(backbone.load("untrained", device="cpu", packed=False))


def test_facts_arrive_as_they_were_sent(facts: BackboneInfo) -> None:
    assert facts.names
    assert BackboneInfo.from_json(facts.as_json()) == facts


def test_several_engines_differ_in_their_devices_alone(facts: BackboneInfo) -> None:
    assert facts.on(["cuda:0"]) == facts
    both = facts.on(["cuda:0", "cuda:1"])
    assert both.device == "cuda:0,cuda:1"
    assert (both.spec, both.dtype, both.names) == (facts.spec, facts.dtype, facts.names)
