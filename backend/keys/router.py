"""A user's own API keys."""

from fastapi import APIRouter, Response

from backend.accounts.dependencies import CurrentUser
from backend.context import ContextDep
from backend.ids import RowId
from backend.keys import service
from backend.keys.models import ApiKey
from backend.keys.schemas import KeyCreated, KeyIn, KeyOut

router = APIRouter(prefix="/api/keys", tags=["keys"])


def _out(key: ApiKey) -> KeyOut:
    return KeyOut(
        id=key.id,
        name=key.name,
        prefix=key.prefix,
        last4=key.last4,
        created_at=key.created_at,
        last_used_at=key.last_used_at,
        expires_at=key.expires_at,
        revoked=key.revoked_at is not None,
    )


@router.get("")
def list_keys(user: CurrentUser, context: ContextDep) -> list[KeyOut]:
    return [_out(key) for key in service.list_keys(context.database, user.id)]


@router.post("", status_code=201)
def create_key(body: KeyIn, user: CurrentUser, context: ContextDep) -> KeyCreated:
    key, clear = service.create(context.database, user.id, body.name, body.expires_in_days)
    return KeyCreated(**_out(key).model_dump(), key=clear)


@router.delete("/{key_id}", status_code=204)
async def revoke_key(key_id: RowId, user: CurrentUser, context: ContextDep) -> Response:
    await context.database.run(service.revoke, context.database, user.id, key_id)
    context.keys.forget()
    context.streams.stop_key(key_id)
    return Response(status_code=204)
