"""The application: routes, what stands before them, and the page."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Sequence
from pathlib import Path

from fastapi import APIRouter, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medplib_jax.serve import chat, monai_label, volumes
from medplib_jax.serve.asking import Asker, new_id
from medplib_jax.serve.dicomweb import DicomWeb
from medplib_jax.serve.engine import Engine
from medplib_jax.serve.model import ServedModel
from medplib_jax.serve.observe import ServerMetrics
from medplib_jax.serve.protect import BodyLimit, Guard, Keys
from medplib_jax.serve.refusals import Refused
from medplib_jax.serve.scans import Scans
from medplib_jax.serve.slices import engine_scan_model
from medplib_jax.serve.store import Bounds, Store
from medplib_jax.serve.volume_jobs import JobRunner

PAGE = Path(__file__).with_name("page")


UPLOADS = ("/images", "/session", "/session/", "/infer/")  # routes whose bodies are scans


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may cost, and what is kept."""

    body: BodyLimit = BodyLimit(2**26, 30.0)
    upload: BodyLimit = BodyLimit(2**31, 600.0)
    answer_seconds: float = 120.0
    shutdown_seconds: float = 30.0
    waiting_jobs: int = 64
    kept: Bounds = Bounds()


@dataclasses.dataclass(frozen=True)
class Served:
    """A model and the engine that owns it."""

    model: ServedModel
    engine: Engine


def make_app(
    served: Sequence[Served],
    store: Store,
    metrics: ServerMetrics,
    keys: Sequence[str],
    hosts: Sequence[str],
    structures: Sequence[str],
    source: DicomWeb | None,
    examples: Sequence[Path],
    limits: Limits,
) -> FastAPI:
    """The server of models with different names; the first one answers who names none.

    `hosts`: names by which browsers may call it, so that no foreign page can reach it through a name of its own.
    `structures`: what MONAI Label's clients, who name none, look for; `source`: where they name series. `examples`:
    pictures that the page offers.
    """
    askers = {one.model.name: Asker(one.engine, one.model, limits.answer_seconds) for one in served}
    drawing = {one.model.name: one.model.drawer is not None for one in served}
    models = {
        one.model.name: functools.partial(engine_scan_model, one.engine, one.model, limits.answer_seconds)
        for one in served
    }
    scans, runner = Scans(store), JobRunner(store, models, limits.waiting_jobs)
    app = FastAPI(title="medplib_jax", docs_url=None, redoc_url=None, lifespan=_life(served, runner, limits))
    app.add_middleware(Guard, keys=Keys(keys), body=limits.body, upload=limits.upload, uploads=UPLOADS)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.exception_handler(Refused)(_refused)
    app.exception_handler(RequestValidationError)(_invalid)
    app.exception_handler(ClientDisconnect)(_gone)
    app.add_middleware(Noting, metrics=metrics)
    app.include_router(chat.make_router(askers))
    app.include_router(volumes.make_router(scans, runner, store, drawing))
    app.include_router(monai_label.make_router(monai_label.Monai(scans, runner, store, drawing, structures, source)))
    app.include_router(_own_routes([one.engine for one in served], metrics))
    app.include_router(_page_routes(examples))
    app.mount("/page", StaticFiles(directory=PAGE), name="page")
    return app


def _life(served: Sequence[Served], runner: JobRunner, limits: Limits):
    @contextlib.asynccontextmanager
    async def life(_: FastAPI):
        for one in served:
            one.engine.start(one.model.example())
        runner.start()
        yield
        runner.close(limits.shutdown_seconds)
        for one in served:
            one.engine.close(limits.shutdown_seconds)

    return life


def _own_routes(engines: Sequence[Engine], metrics: ServerMetrics) -> APIRouter:
    router = APIRouter()

    @router.get("/healthz")
    def health() -> JSONResponse:
        """`ok` when every model answers, else `loading` or `down`."""
        found = {engine.status for engine in engines}
        status = next(status for status in ("down", "loading", "ok") if status in found)
        return JSONResponse({"status": status, "ok": status == "ok"}, 200 if status == "ok" else 503)

    @router.get("/metrics")
    def figures() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    return router


def _page_routes(examples: Sequence[Path]) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return FileResponse(PAGE / "index.html")

    @router.get("/examples")
    def names() -> list[str]:
        return [path.name for path in examples]

    @router.get("/examples/{number}")
    def example(number: int) -> FileResponse:
        if not 0 <= number < len(examples):
            raise Refused(404, "no such example")
        return FileResponse(examples[number])

    return router


def _refused(_: Request, refused: Refused) -> JSONResponse:
    return JSONResponse(refused.as_dict(), refused.status, headers=refused.headers)


def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"][1:])
    return JSONResponse(Refused(400, f"{field}: {first['msg']}", field).as_dict(), 400)


def _gone(_: Request, error: ClientDisconnect) -> JSONResponse:
    return _refused(_, Refused(499, "the client has gone"))


class Noting:
    """ASGI middleware: a line and a count for every request, by its route, since paths and bodies may hold what is
    private.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500  # what an error becomes further out

        async def noting(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.answered(route, scope["method"], status, time.monotonic() - began, new_id("req"))
