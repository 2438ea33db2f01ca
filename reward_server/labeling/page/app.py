"""The labeling page's HTTP API: a thin layer between browsers and a project."""

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from reward_server.bodies import Bodies, Busy, TooLarge, TooSlow
from reward_server.config import Limits
from reward_server.labeling.config import LabelConfig
from reward_server.labeling.items import Answer, Assignment, Conflict
from reward_server.labeling.page.audit import Audit
from reward_server.labeling.page.files import TYPES, files, version
from reward_server.labeling.page.guard import COOKIE, Guard, address
from reward_server.labeling.people import People, Person
from reward_server.labeling.project import Project
from reward_server.listening import Body, parsed, pieces
from reward_server.preferences.records import NotWritten

_COOKIE_S = 30 * 24 * 3600
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; form-action 'none'; frame-ancestors 'none'; base-uri 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_RAW = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
_STATUS: dict[type[Exception], int] = {TooSlow: 408, TooLarge: 413, Busy: 503, NotWritten: 503}


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Token(_Body):
    token: str = Field(min_length=1, max_length=200)


class _Key(_Body):
    key: str = Field(min_length=8, max_length=100)


class _Change(_Key):
    assignment: str = Field(max_length=100)
    version: int = Field(ge=0)
    answer: Answer
    seconds: FiniteFloat = Field(ge=0, le=1e7)


class _LeaveOut(_Body):
    labeler: str = Field(max_length=100)
    reason: str | None = Field(max_length=300)


def create_labeling_app(project: Project, people: People, config: LabelConfig, audit: Path) -> FastAPI:
    """Make the app; `audit` is the file of the audit log.

    Answers 401 without a valid token, 403 for another site's page or who may not, 404 for an assignment that is not the
    labeler's, 408, 413, 415 and 422 for bodies, 409 with the newest state for what another tab has changed, 421 for a
    name that is not ours, 429 for too many requests, 503 when nothing can be written.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Headers)
    log = Audit(audit)
    guard = Guard(people, config, log)
    read = _Reading(config)
    ours = [Depends(guard.host)]
    app.include_router(_page(), dependencies=ours)
    app.include_router(_sessions(guard, read, log), dependencies=ours)
    app.include_router(_labeling(project, guard, read, config), dependencies=ours)
    app.include_router(_admin(project, people, guard, read, log), dependencies=ours)

    @app.exception_handler(Conflict)
    async def conflict(_: Request, error: Conflict) -> Response:
        return JSONResponse({"detail": str(error), "assignment": shown(error.assignment)}, 409)

    for kind, status in _STATUS.items():
        app.add_exception_handler(kind, _refusing(status))
    return app


def shown(assignment: Assignment) -> dict[str, Any]:
    """What a labeler sees of an assignment: nothing that says who wrote what, or that it is measured."""
    return {
        "id": assignment.id,
        "task": assignment.item.task,
        "use": "training" if assignment.use == "training" else "work",
        "prompt": [message.model_dump() for message in assignment.item.prompt],
        "responses": assignment.responses,
        "answer": assignment.answer and assignment.answer.model_dump(),
        "version": assignment.version,
        "seconds": assignment.seconds,
        "submitted": assignment.submitted,
    }


class _Headers:
    """Adds what tells browsers to run nothing but our own files, to every answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                kept = any(name == b"cache-control" for name, _ in message["headers"])
                message["headers"] += [*_RAW, *([] if kept else [(b"cache-control", b"no-store")])]
            await send(message)

        await self._app(scope, receive, sending)


class _Reading:
    """Reads bodies, bounded in bytes and time."""

    def __init__(self, config: LabelConfig) -> None:
        self._bodies = Bodies(Limits(max_body_bytes=config.limits.max_body_bytes))

    async def __call__(self, request: Request, kind: type[Body]) -> Body:
        async with self._bodies.read(pieces(request)) as body:
            return parsed(kind, body)


def _refusing(status: int) -> Any:
    async def refuse(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, status, {"Retry-After": "2"} if status == 503 else None)

    return refuse


def _page() -> APIRouter:
    """The page itself, which holds no secret and so asks for no token."""
    router = APIRouter()

    def file(request: Request, name: str) -> Response:
        content = files().get(name)
        if content is None:
            raise HTTPException(404, "the page has no such file")
        headers = {"Cache-Control": "no-cache", "ETag": f'"{version()}"'}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=TYPES[Path(name).suffix])

    @router.get("/")
    async def index(request: Request) -> Response:
        return file(request, "index.html")

    @router.get("/admin")
    async def admin(request: Request) -> Response:
        return file(request, "admin.html")

    @router.get("/static/{name}")
    async def static(request: Request, name: str) -> Response:
        return file(request, name)

    return router


def _sessions(guard: Guard, read: _Reading, log: Audit) -> APIRouter:
    """Signing in and out."""
    router = APIRouter(dependencies=[Depends(guard.own_page)])

    @router.post("/api/session")
    async def sign_in(request: Request) -> Response:
        token = (await read(request, _Token)).token
        guard.sign_in(request, token)
        answer = Response(status_code=204)
        answer.set_cookie(
            COOKIE, token, _COOKIE_S, path="/", secure=guard.secure(request), httponly=True, samesite="strict"
        )
        return answer

    @router.delete("/api/session")
    async def sign_out(request: Request) -> Response:
        log.note("signed out", address(request))
        answer = Response(status_code=204)
        answer.delete_cookie(COOKIE, path="/", secure=guard.secure(request), httponly=True, samesite="strict")
        return answer

    return router


def _labeling(project: Project, guard: Guard, read: _Reading, config: LabelConfig) -> APIRouter:
    """What a labeler does."""
    router, posts = APIRouter(), APIRouter(dependencies=[Depends(guard.own_page)])
    settings = {
        "quality": config.quality,
        "flags": [{"name": name, "words": words} for name, words in config.flag_words.items()],
        "guidelines": project.guidelines,
        "longest_text": config.limits.max_characters,
    }

    @router.get("/api/me")
    async def me(person: Annotated[Person, Depends(guard.person)]) -> Any:
        own = {"done": 0, "wanted": 0, "per_hour": 0.0} if person.admin else asdict(project.own(person.id))
        return {"id": person.id, "name": person.name, "admin": person.admin, **own, "settings": settings}

    @posts.post("/api/next")
    async def following(person: Annotated[Person, Depends(guard.labeler)]) -> Any:
        found = await project.next(person.id)
        return {"assignment": found and shown(found)}

    @posts.post("/api/draft")
    async def draft(request: Request, person: Annotated[Person, Depends(guard.labeler)]) -> Any:
        return {"version": await _taken(project.draft, person, await read(request, _Change))}

    @posts.post("/api/submit")
    async def submit(request: Request, person: Annotated[Person, Depends(guard.labeler)]) -> Any:
        feedback = await _taken(project.submit, person, await read(request, _Change))
        return {"feedback": feedback and asdict(feedback)}

    @posts.post("/api/undo")
    async def undo(request: Request, person: Annotated[Person, Depends(guard.labeler)]) -> Any:
        found = await project.undo(person.id, (await read(request, _Key)).key)
        return {"assignment": found and shown(found)}

    router.include_router(posts)
    return router


async def _taken(take: Any, person: Person, change: _Change) -> Any:
    """What the project makes of a change; 404 for another's assignment, 422 for what does not fit."""
    try:
        return await take(person.id, change.assignment, change.version, change.answer, change.seconds, change.key)
    except KeyError as error:
        raise HTTPException(404, "this item is not open to you") from error
    except ValueError as error:
        raise HTTPException(422, str(error)) from error


def _admin(project: Project, people: People, guard: Guard, read: _Reading, log: Audit) -> APIRouter:
    """What whoever runs it sees and does."""
    router = APIRouter()

    @router.get("/api/admin")
    async def progress(_: Annotated[Person, Depends(guard.admin)]) -> Any:
        names = {person.id: person.name for person in people.all if not person.admin}
        return {**asdict(await asyncio.to_thread(project.progress)), "names": names}

    @router.post("/api/admin/leave_out", dependencies=[Depends(guard.own_page)])
    async def leave_out(request: Request, person: Annotated[Person, Depends(guard.admin)]) -> Any:
        change = await read(request, _LeaveOut)
        if change.labeler not in {one.id for one in people.all if not one.admin}:
            raise HTTPException(404, f"there is no labeler {change.labeler!r}")
        try:
            await project.leave_out(person.id, change.labeler, change.reason)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        log.note(
            "taken back" if change.reason is None else "left out",
            address(request),
            by=person.id,
            labeler=change.labeler,
            why=change.reason,
        )
        return {}

    return router
