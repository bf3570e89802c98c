"""The application: routes, what stands before them, and the page."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware

from medplib_jax.serve import chat
from medplib_jax.serve.asking import Asker, new_id
from medplib_jax.serve.engine import Engine
from medplib_jax.serve.model import ServedModel
from medplib_jax.serve.protect import Guard, Keys
from medplib_jax.serve.refusals import Refused

PAGE = Path(__file__).with_name("page")


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost."""

    body_bytes: int = 2**26
    body_seconds: float = 30.0
    answer_seconds: float = 120.0
    shutdown_seconds: float = 30.0


def make_app(model: ServedModel, engine: Engine, keys: Sequence[str], hosts: Sequence[str], limits: Limits) -> FastAPI:
    """The server of one model.

    `hosts`: names by which browsers may call it, so that no foreign page can reach it through a name of its own.
    """

    @contextlib.asynccontextmanager
    async def life(_: FastAPI):
        engine.start(model.example())
        yield
        engine.close(limits.shutdown_seconds)

    app = FastAPI(title="medplib_jax", docs_url=None, redoc_url=None, lifespan=life)
    app.add_middleware(Guard, keys=Keys(keys), max_body=limits.body_bytes, body_seconds=limits.body_seconds)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.exception_handler(Refused)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.middleware("http")(_note_requests(engine))
    app.include_router(chat.make_router(Asker(engine, model, limits.answer_seconds)))

    @app.get("/healthz")
    def health() -> JSONResponse:
        return JSONResponse({"status": engine.status}, 200 if engine.status == "ok" else 503)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(engine.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _refused(_: Request, refused: Refused) -> JSONResponse:
    return JSONResponse(refused.as_dict(), refused.status, headers=refused.headers)


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(Refused(400, f"{field}: {first['msg']}", field).as_dict(), 400)


def _note_requests(engine: Engine):
    """A line and a count for every request, by its route: paths and bodies may hold what is private."""

    async def note(request: Request, call_next):
        began = time.monotonic()
        response = await call_next(request)
        route = getattr(request.scope.get("route"), "path", "unknown")
        engine.metrics.answered(route, request.method, response.status_code, time.monotonic() - began, new_id("req"))
        return response

    return note
