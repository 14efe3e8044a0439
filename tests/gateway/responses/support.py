"""What is asked of /v1/responses in most tests, and of whom."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from baton.gateway.app import create_app
from baton.gateway.context import Context
from baton.gateway.responses.service import ResponseService
from baton.telemetry import GatewayMetrics

URL = "/v1/responses"
BODY = {"model": "tiny", "input": "Hi"}
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL = {"type": "function", "name": "weather", "parameters": SCHEMA}
ARGUMENTS = '{"city": "Bern"}'
CALL = f'<tool_call>{{"name": "weather", "arguments": {ARGUMENTS}}}</tool_call>'
LOGPROBS = "message.output_text.logprobs"
KEYS = ("alice", "bob")
MakeService = Callable[..., ResponseService]


def another(context: Context, service: ResponseService) -> FastAPI:
    """A gateway beside the first one."""
    metrics = GatewayMetrics(CollectorRegistry())
    return create_app(replace(context, metrics=metrics), responses=service)


def client_of(app: FastAPI, key: str = "alice") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers)


async def created(client: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    response = await client.post(URL, json=BODY | fields)
    assert response.status_code == 200, response.text
    return dict(response.json())


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    return dict(response.json()["error"])
