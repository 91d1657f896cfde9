"""/v1: the OpenAI-style door, with a key in the Authorization header."""

from typing import Annotated

import httpx2
import msgspec
from fastapi import APIRouter, Depends, Request, Response

from backend.context import ContextDep
from backend.errors import ApiError
from backend.gateway.call import GatewayCall
from backend.gateway.limits import ratelimit_headers
from backend.gateway.request import read_request
from backend.gateway.service import service_headers
from backend.keys.service import KeyOwner
from backend.upstream import error_of, unavailable
from backend.usage.service import Caller

router = APIRouter(prefix="/v1", tags=["gateway"])

_METERED = ("chat/completions", "completions", "embeddings", "rerank")


async def key_owner(request: Request, context: ContextDep) -> KeyOwner:
    """The owner of the bearer key. Unknown, expired and revoked keys look alike."""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    owner = await context.keys.owner(key.strip()) if scheme.lower() == "bearer" else None
    if owner is None:
        raise ApiError(
            401,
            "invalid_api_key",
            "The API key is missing, wrong, expired or revoked. Make a new one on the key page.",
        )
    return owner


KeyOwnerDep = Annotated[KeyOwner, Depends(key_owner)]


@router.get("/models")
async def models(_: KeyOwnerDep, context: ContextDep) -> Response:
    return await _get(context, "/v1/models")


@router.get("/models/{model_id:path}")
async def model(model_id: str, _: KeyOwnerDep, context: ContextDep) -> Response:
    listed = await _ask(context, "/v1/models")
    if listed.status_code == 200:
        for row in listed.json().get("data", []):
            if row.get("id") == model_id:
                return Response(msgspec.json.encode(row), media_type="application/json")
    raise ApiError(404, "model_not_found", f"There is no model called {model_id}.", param="model")


async def _ask(context: ContextDep, path: str) -> httpx2.Response:
    try:
        response = await context.upstream.client.get(path, timeout=10.0)
    except httpx2.HTTPError as error:
        raise unavailable() from error
    if response.status_code >= 400:
        wait = response.headers.get("retry-after")
        raise error_of(response.status_code, response.content, wait)
    return response


async def _get(context: ContextDep, path: str) -> Response:
    response = await _ask(context, path)
    return Response(response.content, media_type=response.headers.get("content-type"))


async def call(request: Request, owner: KeyOwnerDep, context: ContextDep) -> Response:
    """Reserve, then pass the call on; GatewayCall settles."""
    left = context.requests.take(owner.user_id)
    raw = await request.body()
    model = await context.upstream.model()
    prepared = read_request(raw, model, context.settings.context_tokens, f"user-{owner.user_id}")
    service = service_headers(model, owner.user_id, owner.service_class, request.headers)
    caller = Caller(owner.user_id, "gateway", key_id=owner.key_id)
    meter = await context.ledger.open(caller, prepared.reservation)
    headers = ratelimit_headers(
        context.requests.per_minute, left, context.ledger.daily_tokens, meter.reserved.remaining
    )
    request_id = str(request.scope.get("state", {}).get("request_id", ""))
    return GatewayCall(
        context, owner, request.url.path, prepared, meter, service, headers, request_id
    )


for _path in _METERED:
    router.add_api_route(f"/{_path}", call, methods=["POST"], name=_path)


async def unknown(path: str, _: KeyOwnerDep) -> Response:
    raise ApiError(404, "not_found", f"There is no /v1/{path} here for this method.")


for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
    router.add_api_route("/{path:path}", unknown, methods=[_method])
