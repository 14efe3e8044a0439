"""GET /v1/models and /v1/models/{model}."""

import time
from typing import Any

from fastapi import APIRouter, HTTPException

from baton.gateway.backend import ServedModel
from baton.gateway.context import Context
from baton.gateway.errors import ERROR_RESPONSES


def models_router(context: Context) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    created = int(time.time())  # for people; nothing is measured with it

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        entries = [_entry(model, created) for model in context.backend.models()]
        return {"object": "list", "data": entries}

    @router.get("/v1/models/{model:path}")  # names have slashes
    async def get_model(model: str) -> dict[str, Any]:
        if not model:  # no name is no wish for the default
            raise HTTPException(404)
        return _entry(context.find_model(model), created)

    return router


def _entry(model: ServedModel, created: int) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": "baton",
        "root": model.name,
        "parent": None,
        "max_model_len": model.max_model_len,
    }
    return entry if model.pooling is None else {**entry, "task": model.pooling.task.value}
