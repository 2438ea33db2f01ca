"""The reward server: POST /score, GET /health, /metrics, /openapi.json and the page /docs over one source."""

import asyncio
import copy
import hmac
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exception_handlers import http_exception_handler
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse, PlainTextResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import ValidationError
from swagger_ui_bundle import swagger_ui_path

from reward_server.address import is_loopback
from reward_server.batching import Batching, Contradiction
from reward_server.bodies import Bodies, Busy, TooLarge, TooSlow
from reward_server.config import Limits
from reward_server.listening import CUT, Listening, host_name, listen, parsed, pieces
from reward_server.meters import CONTENT_TYPE, Meters
from reward_server.redaction import shown
from reward_server.schema import ScoreBatch, ScoreBatchReply
from reward_server.sources import Source

_log = logging.getLogger(__name__)
_SCHEMAS = "#/components/schemas/{model}"
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": _SCHEMAS.format(model="ScoreBatch")}}},
    }
}
_REASONS = {
    401: "token",
    408: "slow",
    409: "contradiction",
    413: "too large",
    415: "not JSON",
    421: "host",
    422: "malformed",
    CUT: "cut off",
    503: "busy",
}
_STATUS: dict[type[Exception], int] = {TooSlow: 408, Contradiction: 409, TooLarge: 413, Busy: 503}
_AGAIN = {"Retry-After": "1"}
_NO_TOKEN: dict[int | str, dict[str, Any]] = {401: {"description": "the bearer token is missing or wrong"}}
_NO_HOST: dict[int | str, dict[str, Any]] = {421: {"description": "asked for under a name that is not the loopback's"}}
_NO_SCORES: dict[int | str, dict[str, Any]] = {
    408: {"description": "the body came too slowly"},
    409: {"description": "a request id was used before with another content"},
    413: {"description": "too many requests, or bytes"},
    415: {"description": "not application/json"},
    422: {"description": "malformed, or a response that cannot be scored"},
    500: {"description": "the source failed, and why"},
    503: {"description": "too many posts or bytes are waiting; Retry-After says when to ask again"},
}
_PAGE_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")


def create_app(source: Source, token: str | None = None, limits: Limits | None = None) -> FastAPI:
    """Make the app; with a `token` every request but for /docs must carry it as "Authorization: Bearer TOKEN".

    Without one it answers only under the loopback's names, so that no web page can reach it under a name of its own.
    Answers 401 for a wrong token, 421 for a wrong name, 409 for an id that was used for another content, 408, 413 and
    422 for what is too slow, too large or malformed, 500 with the reason when the source fails, 503 when too much is
    waiting. It never makes a score up.
    """
    limits = limits or Limits()
    meters = Meters()
    scoring, bodies = Batching(source, limits, meters.turn), Bodies(limits)
    meters.watch(scoring)
    app = FastAPI(
        title="Rayward reward server",
        description="Scores of responses: text in, numbers out.",
        docs_url=None,  # FastAPI's own pages ask for no token and load their scripts from elsewhere
        redoc_url=None,
        openapi_url=None,
    )
    app.openapi_version = "3.0.3"  # the newest that the page's Swagger UI reads
    allowed, refused = (_at_loopback, _NO_HOST) if token is None else (_bearing(token), _NO_TOKEN)
    closed = APIRouter(dependencies=[Depends(allowed)], responses=refused)

    app.state.scoring = scoring

    @app.exception_handler(HTTPException)
    async def told(request: Request, error: HTTPException) -> Response:
        error.detail = shown(error.detail)
        return await http_exception_handler(request, error)

    @app.middleware("http")
    async def observed(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        started = time.monotonic()
        answer = await call_next(request)
        if request.url.path == "/score":
            reason = getattr(request.state, "refused", None) or _REASONS.get(answer.status_code)
            meters.post(answer.status_code, time.monotonic() - started, reason)
        return answer

    @closed.post("/score", response_model=ScoreBatchReply, openapi_extra=_BODY, responses=_NO_SCORES)
    async def score(request: Request) -> Response:
        """One finite score for each response, in order. A request id that was scored before is not scored again."""
        try:
            async with bodies.read(pieces(request)) as body:
                batch = await asyncio.to_thread(parsed, ScoreBatch, body)
                replies = await scoring.score(batch.requests)
        except HTTPException:
            raise
        except tuple(_STATUS) as error:
            raise HTTPException(
                _STATUS[type(error)], str(error), _AGAIN if isinstance(error, Busy) else None
            ) from error
        except Exception as error:
            refused = isinstance(error, ValueError) and not isinstance(error, ValidationError)
            request.state.refused = "cannot be scored" if refused else "source failed"
            if not refused:
                _log.exception("scoring a post failed")
            raise HTTPException(422 if refused else 500, f"{type(error).__name__}: {error}") from error
        return Response(ScoreBatchReply(replies=replies).model_dump_json(), media_type="application/json")

    @closed.get("/health", responses={503: {"description": "no scores can be had, and why"}})
    async def health() -> dict[str, str]:
        """Scores a fixed response, so that "ok" means that scores can be had."""
        try:
            async with asyncio.timeout(limits.health_s):
                await scoring.probe()
        except TimeoutError as error:
            raise HTTPException(503, f"no turn for the probe within {limits.health_s:g} s") from error
        except Exception as error:
            raise HTTPException(503, f"the probe failed: {type(error).__name__}: {error}") from error
        return {"status": "ok"}

    @closed.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """What Prometheus scrapes: posts, refusals, responses, tokens and seconds of this copy."""
        return Response(meters.page(), media_type=CONTENT_TYPE)

    @closed.get("/openapi.json", include_in_schema=False)
    async def openapi() -> dict[str, Any]:
        return _schema(app)

    app.include_router(closed)
    app.include_router(_page(app))
    return app


def _bearing(token: str) -> Callable[..., None]:
    """A dependency that answers 401 without the token."""
    bearer = HTTPBearer(auto_error=False, description="RAYWARD_REWARD_TOKEN of the server")

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if given is None or not hmac.compare_digest(given.credentials.encode(), token.encode()):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    return authorised


def _at_loopback(request: Request) -> None:
    """Answers 421 to a name that is not the loopback's, with which a web page would reach what it must not."""
    name = host_name(request)
    if not is_loopback(name):
        raise HTTPException(421, f"without a token this server answers only as 127.0.0.1 or localhost, not {name!r}")


def _page(app: FastAPI) -> APIRouter:
    """The page /docs, which holds no secret and so asks for no token, and takes nothing from elsewhere."""
    page = APIRouter(include_in_schema=False)

    @page.get("/docs")
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url="docs/swagger-ui-bundle.js",
            swagger_css_url="docs/swagger-ui.css",
            swagger_favicon_url="docs/favicon-32x32.png",
            # In the page, since a browser asks for /openapi.json without the token.
            swagger_ui_parameters={"spec": _schema(app), "defaultModelsExpandDepth": 2},
        )

    @page.get("/docs/{name}")
    async def file(name: str) -> FileResponse:
        if name not in _PAGE_FILES:
            raise HTTPException(404, "the page has no such file")
        return FileResponse(swagger_ui_path / name)

    return page


def _schema(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. The body of /score is read piece by piece, so FastAPI does not know its type."""
    body = ScoreBatch.model_json_schema(ref_template=_SCHEMAS)
    schema = copy.deepcopy(app.openapi())
    schema["components"]["schemas"] |= {**body.pop("$defs"), "ScoreBatch": body}
    return schema


class ScoreServer:
    """A reward server that runs in a thread of this process."""

    def __init__(self, listening: Listening, scoring: Batching) -> None:
        """Take a server that was started; `serve` makes one."""
        self._listening = listening
        self._scoring = scoring
        self.url = listening.url

    def stats(self) -> dict[str, float]:
        """Posts that are computed or wait, responses scored so far, seconds of the present batch; from any thread."""
        return {name: float(getattr(self._scoring, name)) for name in ("waiting", "scored", "computing_s")}

    def close(self, deadline_s: float = 10.0) -> None:
        """Stop taking requests, finish those under way; raises TimeoutError when that takes too long."""
        self._listening.close(deadline_s)


def serve(
    source: Source,
    host: str = "127.0.0.1",
    port: int = 0,
    token: str | None = None,
    limits: Limits | None = None,
    deadline_s: float = 30.0,
) -> ScoreServer:
    """Start a reward server in a thread and return once it listens; port 0 takes a free one.

    Raises ValueError for an address off the loopback without a token, OSError when the port is taken,
    TimeoutError when it does not listen within `deadline_s` seconds.
    """
    if token is not None and not token.strip():
        raise ValueError("the reward server's token is empty; set a secret one, or none on the loopback")
    if token is None and not is_loopback(host):
        raise ValueError(
            f"the reward server would listen on {host!r}, which others can reach, without a token; set one, "
            "or listen on 127.0.0.1"
        )
    app = create_app(source, token, limits)
    return ScoreServer(listen(app, "the reward server", host, port, limits, deadline_s), app.state.scoring)
