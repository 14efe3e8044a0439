"""Our own OpenAPI document against the application: schemathesis sends what the document allows and
what it forbids. Nothing makes a 5xx or an undocumented answer; what is forbidden is refused."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import CheckFunction
from schemathesis.specs.openapi import checks
from schemathesis.specs.openapi.schemas import OpenApiSchema

from baton.gateway.app import create_app
from baton.gateway.backend import ServedModel
from baton.pooling import PoolingInfo, PoolingTask
from baton.settings import GatewaySettings, LimitSettings
from baton.text import Tokenizer, TokenizerPool
from tests.gateway.conftest import make_context
from tests.gateway.fakes import FakeBackend, Script

CHECKS: list[CheckFunction] = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


@pytest.fixture(scope="module")
def app(
    tokenizer: Tokenizer, model: ServedModel, say: Callable[[str], Script]
) -> Iterator[FastAPI]:
    """Serves every kind of request."""
    pooling = PoolingInfo(PoolingTask.EMBED, 4, is_matryoshka=True)
    served = (model, replace(model, name="pooler", pooling=pooling))
    backend = FakeBackend(say("Hello world"), served)
    pool = TokenizerPool(tokenizer, num_threads=1, max_pending=64)
    settings = GatewaySettings.model_validate({})
    yield create_app(make_context(backend, pool, settings, LimitSettings()))
    pool.close()


@pytest.fixture(scope="module")
def schema(app: FastAPI) -> OpenApiSchema:
    return schemathesis.openapi.from_asgi("/openapi.json", app)


def operations() -> list[tuple[str, str]]:
    return [
        (method, path)
        for path, methods in {
            "/v1/completions": ("post",),
            "/v1/chat/completions": ("post",),
            "/v1/completions/render": ("post",),
            "/v1/chat/completions/render": ("post",),
            "/inference/v1/generate": ("post",),
            "/tokenize": ("post",),
            "/detokenize": ("post",),
            "/v1/embeddings": ("post",),
            "/score": ("post",),
            "/v1/score": ("post",),
            "/rerank": ("post",),
            "/v1/rerank": ("post",),
            "/v2/rerank": ("post",),
            "/invocations": ("post",),
            "/v1/messages": ("post",),
            "/v1/messages/count_tokens": ("post",),
            "/v1/responses": ("post",),
            "/v1/responses/{response_id}": ("get", "delete"),
            "/v1/responses/{response_id}/cancel": ("post",),
            "/v1/models": ("get",),
            "/v1/models/{model}": ("get",),
            "/v1/cluster": ("get",),
            "/health": ("get",),
            "/load": ("get",),
            "/version": ("get",),
            "/metrics": ("get",),
        }.items()
        for method in methods
    ]


def test_every_documented_operation_is_tested(app: FastAPI) -> None:
    documented = {
        (method, path) for path, methods in app.openapi()["paths"].items() for method in methods
    }
    assert documented == set(operations())


def run(
    schema: OpenApiSchema, method: str, path: str, mode: GenerationMode, num_examples: int
) -> None:
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    @settings(
        max_examples=num_examples,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    check()


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), operations())
def test_our_document(schema: OpenApiSchema, method: str, path: str, mode: GenerationMode) -> None:
    if mode is GenerationMode.NEGATIVE and (method != "post" or path.endswith("/cancel")):
        return  # there is nothing to get wrong
    run(schema, method, path, mode, 15)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(
    ("method", "path"), [o for o in operations() if o[0] == "post" and not o[1].endswith("/cancel")]
)
def test_our_document_at_length(
    schema: OpenApiSchema, method: str, path: str, mode: GenerationMode
) -> None:
    run(schema, method, path, mode, 100)
