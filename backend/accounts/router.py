"""Login, logout, change of password, who am I; and users, for administrators."""

from fastapi import APIRouter, Request, Response

from backend.accounts import service, sessions
from backend.accounts.dependencies import (
    Administrator,
    SignedIn,
    client_address,
    session_token,
)
from backend.accounts.schemas import (
    LoginIn,
    LoginOut,
    MeOut,
    ModelState,
    MyCourse,
    OneTimePassword,
    PasswordIn,
    UserAdminOut,
    UserChange,
    UserCreated,
    UserIn,
    UserOut,
)
from backend.context import ContextDep
from backend.courses.service import courses_of
from backend.errors import ApiError
from backend.ids import RowId

router = APIRouter(prefix="/api", tags=["accounts"])


def _login_out(login: service.Login) -> LoginOut:
    return LoginOut(
        token=login.token, expires_at=login.expires_at, user=UserOut.model_validate(login.user)
    )


@router.post("/auth/login")
def login(body: LoginIn, request: Request, context: ContextDep) -> LoginOut:
    try:
        done = service.login(
            context.database,
            context.passwords,
            context.settings,
            body.username,
            body.password,
            client_address(request, context.settings),
        )
    except ApiError:
        context.metrics.login_failures.inc()
        raise
    return _login_out(done)


@router.post("/auth/logout", status_code=204)
def logout(_: SignedIn, request: Request, context: ContextDep) -> Response:
    with context.database.write() as session:
        sessions.end(session, session_token(request) or "")
    return Response(status_code=204)


@router.post("/auth/password")
def change_password(
    body: PasswordIn, user: SignedIn, request: Request, context: ContextDep
) -> LoginOut:
    done = service.change_password(
        context.database,
        context.passwords,
        context.settings,
        user,
        body.current_password,
        body.new_password,
        client_address(request, context.settings),
    )
    return _login_out(done)


@router.get("/me")
async def me(user: SignedIn, context: ContextDep) -> MeOut:
    rows = await context.database.run(courses_of, context.database, user)
    model = await context.upstream.model()
    return MeOut(
        user=UserOut.model_validate(user),
        courses=[MyCourse(id=c.id, slug=c.slug, name=c.name, role=role) for c, role in rows],
        model=ModelState(
            id=model.id if model else None,
            untrained=model.untrained if model else False,
            available=model is not None,
        ),
    )


@router.get("/users")
def list_users(_: Administrator, context: ContextDep) -> list[UserAdminOut]:
    return [UserAdminOut.model_validate(user) for user in service.list_users(context.database)]


@router.post("/users", status_code=201)
def create_user(body: UserIn, _: Administrator, context: ContextDep) -> UserCreated:
    user, password = service.create_user(
        context.database, context.passwords, body.username, body.display_name, body.role
    )
    return UserCreated(user=UserAdminOut.model_validate(user), one_time_password=password)


@router.post("/users/{user_id}/reset")
def reset_password(user_id: RowId, _: Administrator, context: ContextDep) -> OneTimePassword:
    password = service.reset_password(context.database, context.passwords, user_id)
    return OneTimePassword(one_time_password=password)


@router.patch("/users/{user_id}")
async def change_user(
    user_id: RowId, body: UserChange, _: Administrator, context: ContextDep
) -> UserAdminOut:
    user = await context.database.run(service.change_user, context.database, user_id, body)
    if not user.active:
        context.keys.forget()
        context.streams.stop_user(user_id)
    return UserAdminOut.model_validate(user)
