"""/v1/responses: create, retrieve, cancel, delete."""

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute

from baton.errors import BatonError, Cause, InvalidRequest
from baton.gateway.chat import begin
from baton.gateway.context import Context
from baton.gateway.errors import ERROR_RESPONSES
from baton.gateway.responses.background import Run
from baton.gateway.responses.events import TERMINAL
from baton.gateway.responses.fields import ResponsesRequest, param_of
from baton.gateway.responses.items import is_unfinished
from baton.gateway.responses.reader import EventsResponse
from baton.gateway.responses.service import ResponseService
from baton.gateway.responses.shape import ResponsesShape
from baton.gateway.responses.store import StoredResponse
from baton.gateway.stream import GenerationResponse, Streaming

PATH = "/v1/responses"
_CANCEL_S = 5.0  # until the gateway that runs it has heard of it
_POLL_S = 0.1


def responses_router(
    context: Context, service: ResponseService, route_class: type[APIRoute]
) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], responses=ERROR_RESPONSES)
    with_body = APIRouter(tags=["OpenAI"], route_class=route_class)

    @with_body.post(PATH, response_class=Response)
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        return await _create(context, service, body, request)

    @router.get(f"{PATH}/{{response_id}}", response_class=Response)
    async def get_response(
        response_id: str,
        request: Request,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0, lt=2**53)] = None,
    ) -> Response:
        tenant = service.tenant(request)
        stored = await service.find(tenant, response_id)
        if not stream:
            return JSONResponse(stored.response)
        if not stored.response["background"]:
            raise InvalidRequest("Only responses in the background can be streamed.", "stream")
        return EventsResponse(service, context.limits, tenant, response_id, starting_after)

    @router.delete(f"{PATH}/{{response_id}}")
    async def delete_response(response_id: str, request: Request) -> dict[str, Any]:
        tenant = service.tenant(request)
        await service.cancel(tenant, await service.find(tenant, response_id))
        await service.delete(tenant, response_id)
        return {"id": response_id, "object": "response.deleted", "deleted": True}

    @router.post(f"{PATH}/{{response_id}}/cancel", response_class=Response)
    async def cancel_response(response_id: str, request: Request) -> Response:
        """Ends it on every worker. One that is over already stays as it is."""
        tenant = service.tenant(request)
        stored = await service.find(tenant, response_id)
        if not stored.response["background"]:
            raise InvalidRequest("Only responses in the background can be cancelled.")
        await service.cancel(tenant, stored)
        return JSONResponse((await _over(service, tenant, stored)).response)

    router.routes.extend(with_body.routes)
    return router


async def _create(
    context: Context, service: ResponseService, body: ResponsesRequest, request: Request
) -> Response:
    body.check()
    tenant = service.tenant(request)
    items = await service.items(tenant, body)
    messages = await service.conversation(tenant, body, items)
    keeps = await service.keeps(body)
    try:
        chat = body.to_chat(messages, goes_on=is_unfinished(items))
        generation = begin(context, chat, request, PATH, id_prefix="resp", prompt_param="input")
    except InvalidRequest as error:
        raise InvalidRequest(error.message, param_of(error.param), error.cause) from None
    shape = ResponsesShape(context, body, chat, generation, store=keeps)
    if body.background:
        await service.run(Run(tenant, generation, shape, messages))
        if body.stream:
            return EventsResponse(service, context.limits, tenant, shape.id)
        return JSONResponse({**shape.response, "status": "queued", "output": []})

    async def keep() -> None:
        await service.keep(tenant, shape.response, messages)

    how = Streaming(named_events=True, failure=shape.failure) if body.stream else None
    return GenerationResponse(generation, shape, context.limits, streaming=how, before_end=keep)


async def _over(service: ResponseService, tenant: str, stored: StoredResponse) -> StoredResponse:
    """
    Raises:
        BatonError: DEADLINE_EXCEEDED, it goes on.
    """
    deadline_s = asyncio.get_running_loop().time() + _CANCEL_S
    while stored.response["status"] not in TERMINAL:
        if asyncio.get_running_loop().time() > deadline_s:
            raise BatonError(Cause.DEADLINE_EXCEEDED, "The response has not ended yet.")
        await asyncio.sleep(_POLL_S)
        stored = await service.find(tenant, stored.response["id"])
    return stored
