"""What the OpenAPI document allows, and what it does not, never ends in a 5xx: schemathesis makes the requests."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from serve_cases import Server

EXAMPLES = 6  # of each kind, for each route
QUICK = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def call_all(operation: Any, mode: GenerationMode, found: list[str]) -> None:
    """Requests to one route, legal or not; those that end in a 5xx are noted."""

    @QUICK
    @given(case=operation.as_strategy(generation_mode=mode))
    def call(case: schemathesis.Case) -> None:
        response = case.call(timeout=60)
        if response.status_code >= 500:
            found.append(f"{response.status_code} {case.as_curl_command()} {response.content!r:.300}")

    with suppress(Unsatisfiable):  # a route without parameters has no illegal ones
        call()


def test_no_server_error(server: Server) -> None:
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    found: list[str] = []
    operations = [result.ok() for result in document.get_all_operations()]
    for operation in operations:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            call_all(operation, mode, found)
    assert len(operations) > 8 and not found, "\n".join(found)
