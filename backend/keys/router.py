"""A user's own API keys, and the classes of keys.

Teachers may choose the class of their own keys, administrators that of all.
"""

from fastapi import APIRouter, Response

from backend.accounts.dependencies import Administrator, CurrentUser, Teacher, teacher
from backend.context import ContextDep
from backend.errors import ApiError
from backend.ids import RowId
from backend.keys import service
from backend.keys.models import STANDARD, ApiKey
from backend.keys.schemas import KeyChange, KeyCreated, KeyIn, KeyOut
from backend.settings import Settings

router = APIRouter(prefix="/api", tags=["keys"])


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
        service_class=key.service_class,
    )


def _check_class(name: str, settings: Settings) -> None:
    if name not in settings.class_names:
        raise ApiError(
            400,
            "invalid_value",
            f"There is no class {name!r}; choose one of {', '.join(settings.class_names)}.",
            param="service_class",
        )


@router.get("/keys")
def list_keys(user: CurrentUser, context: ContextDep) -> list[KeyOut]:
    return [_out(key) for key in service.list_keys(context.database, user.id)]


@router.post("/keys", status_code=201)
def create_key(body: KeyIn, user: CurrentUser, context: ContextDep) -> KeyCreated:
    if body.service_class != STANDARD:
        teacher(user)
        _check_class(body.service_class, context.settings)
    key, clear = service.create(
        context.database, user.id, body.name, body.expires_in_days, body.service_class
    )
    return KeyCreated(**_out(key).model_dump(), key=clear)


@router.get("/users/{user_id}/keys")
def list_keys_of(user_id: RowId, _: Administrator, context: ContextDep) -> list[KeyOut]:
    return [_out(key) for key in service.list_keys(context.database, user_id)]


@router.patch("/keys/{key_id}")
async def change_key(key_id: RowId, body: KeyChange, user: Teacher, context: ContextDep) -> KeyOut:
    _check_class(body.service_class, context.settings)
    owner = None if user.role == "administrator" else user.id
    key = await context.database.run(
        service.set_class, context.database, key_id, body.service_class, owner
    )
    context.keys.forget()
    return _out(key)


@router.delete("/keys/{key_id}", status_code=204)
async def revoke_key(key_id: RowId, user: CurrentUser, context: ContextDep) -> Response:
    await context.database.run(service.revoke, context.database, user.id, key_id)
    context.keys.forget()
    context.streams.stop_key(key_id)
    return Response(status_code=204)
