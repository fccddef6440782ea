"""Every route of the OpenAPI document, asked what it says it takes and what it does not: never a 500, never an answer
that is not as documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import SkipTest

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core.failures import FailureGroup
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance

from tests.api.api_server import Api, serving
from tests.fuzz.budget import EXAMPLES, large
from tests.serving.floor import publish

EXPECTED = {501, 504, 507}  # packages that are not installed, a deadline of nothing, a disk that is full
OCTETS = "application/octet-stream"
CHECKS = [content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    options = {"request_timeout_s": 5, "upload_silence_s": 1, "body_timeout_s": 5}
    with serving(tmp_path_factory.mktemp("home"), **options) as made:
        publish(made.floor.store)
        publish(made.floor.store, "cat", seed=2)
        yield made


def bodies(document: dict[str, Any]) -> set[str]:
    """Media types that some route takes."""
    routes = [route for path in document["paths"].values() for route in path.values() if isinstance(route, dict)]
    return {kind for route in routes for kind in route.get("requestBody", {}).get("content", {})}


@pytest.fixture(scope="module")
def operations(api: Api) -> dict[str, APIOperation]:
    document = api.http.get("/openapi.json").json()
    for kind in sorted(bodies(document) - {"application/json", "multipart/form-data", OCTETS}):
        schemathesis.serializer.alias(kind, OCTETS)
    schema = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    return {each.ok().label: each.ok() for each in schema.get_all_operations()}


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["valid", "invalid"])
def test_every_route_keeps_its_word(mode: GenerationMode, api: Api, operations: dict[str, APIOperation]) -> None:
    assert len(operations) > 40
    broken: dict[str, str] = {}
    for name, operation in operations.items():
        if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
            continue  # nothing invalid can be said to it
        publish(api.floor.store)  # an earlier route may have deleted it
        try:
            ask(operation, mode)
        except (FailureGroup, AssertionError, httpx.TransportError) as error:
            broken[name] = "\n".join(map(str, getattr(error, "exceptions", [error])))[:1500]
        except (SkipTest, Unsatisfiable):
            continue
    assert not broken, "\n\n".join(f"{name}\n{told}" for name, told in broken.items())
    assert api.http.get("/healthz").status_code == 200


def ask(operation: APIOperation, mode: GenerationMode) -> None:
    @given(case=operation.as_strategy(generation_mode=mode), known=st.booleans())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=not large(),
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, *([Phase.shrink] if large() else [])],
    )
    def keeps_its_word(case: schemathesis.Case, known: bool) -> None:
        if known and "task" in case.path_parameters:
            case.path_parameters["task"] = "fish"
        response = case.call(timeout=30)
        assert response.status_code < 500 or response.status_code in EXPECTED, (
            f"{case.as_curl_command()}\n{response.text}"
        )
        case.validate_response(response, checks=CHECKS)
        assert "Traceback" not in response.text

    keeps_its_word()
