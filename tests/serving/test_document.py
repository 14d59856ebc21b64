"""The OpenAPI document against the service, by Schemathesis: MEDCLIP_LAB_CASES says how many cases (default: 60)."""

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings

schemathesis = pytest.importorskip("schemathesis")

from schemathesis import checks  # noqa: E402

from medclip_lab.serving import Settings  # noqa: E402

from .conftest import Serving  # noqa: E402

CASES = int(os.environ.get("MEDCLIP_LAB_CASES", "60"))
KEPT = [
    checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def address(toy_settings: Settings) -> Iterator[str]:
    with Serving(toy_settings) as address:
        yield address


def test_the_service_keeps_what_its_document_promises(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations = [operation.ok() for operation in schema.get_all_operations()]
    assert len(operations) > 15
    tried = 0
    for operation in operations:

        @settings(
            max_examples=max(CASES // len(operations), 1),
            deadline=None,
            derandomize=True,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy())
        def one(case: Any) -> None:
            nonlocal tried
            tried += 1
            answer = case.call()
            if answer.status_code == 501:  # what a model cannot do is documented, and no failure of the service
                assert answer.headers["content-type"] == ["application/problem+json"]
                return
            case.validate_response(answer, checks=KEPT)

        one()
    assert tried >= len(operations)
