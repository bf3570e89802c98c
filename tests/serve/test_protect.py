"""What stands before the routes: keys, sizes, slow bodies and the headers that keep a browser safe."""

import asyncio
import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from medplib_jax.serve.protect import BodyLimit, Guard, Keys
from medplib_jax.serve.refusals import Refused

KEY = "correct horse"


async def echo(request: Request):
    body = await request.body()
    return PlainTextResponse(f"{request.state.client}:{len(body)}")


def application(keys=(), max_body=1000, seconds=5.0):
    app = Starlette(
        routes=[
            Route("/healthz", echo),
            Route("/x", echo, methods=["GET", "POST"]),
            Route("/scans/{x}", echo, methods=["POST"]),
        ]
    )
    app.add_exception_handler(Refused, lambda _, refused: PlainTextResponse(refused.message, refused.status))
    body, upload = BodyLimit(max_body, seconds), BodyLimit(3 * max_body, seconds)
    return Guard(app, Keys(keys), body, upload, ["/scans/"])


def client(**options) -> TestClient:
    return TestClient(application(**options), raise_server_exceptions=True)


def basic(password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"anybody:{password}".encode()).decode()}


@pytest.mark.parametrize(
    "headers", [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer {KEY}"}, basic(KEY)]
)
def test_a_key_opens_every_route(headers):
    assert client(keys=[KEY]).get("/x", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": KEY}, {"Authorization": "Basic !!"}, basic("wrong")],
)
def test_without_the_key_only_the_health_is_shown(headers):
    found = client(keys=[KEY]).get("/x", headers=headers)
    assert found.status_code == 401 and "www-authenticate" in found.headers
    assert client(keys=[KEY]).get("/healthz", headers=headers).status_code == 200
    assert client(keys=[KEY]).get("/not-there", headers=headers).status_code == 401


@given(st.text(max_size=20))
def test_no_other_key_is_admitted(key):
    assert Keys([KEY]).admits(key) == (key == KEY)


def test_clients_are_told_apart_without_their_keys_being_kept():
    first, second = (client(keys=["a", "b"]).get("/x", headers={"Authorization": f"Bearer {key}"}).text for key in "ab")
    assert first != second and not first.startswith("a:")


def test_a_body_over_the_limit_is_refused_by_its_header_and_by_its_bytes():
    assert client().post("/x", content=b"x" * 1000).text.endswith(":1000")
    assert client().post("/x", content=b"x" * 1001).status_code == 413
    assert client().post("/x", content=iter([b"x" * 600] * 2)).status_code == 413


def test_an_upload_may_be_larger_and_is_bounded_too():
    assert client().post("/scans/1", content=iter([b"x" * 1500] * 2)).text.endswith(":3000")
    assert client().post("/scans/1", content=b"x" * 3001).status_code == 413
    assert client().post("/scans/1", content=iter([b"x" * 1501] * 2)).status_code == 413


@pytest.mark.parametrize("path", ["/x", "/scans/1"])
def test_a_body_that_does_not_come_is_not_waited_for(path):
    sent = []

    async def never():
        await asyncio.Event().wait()

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "headers": [],
        "client": ("1", 1),
        "state": {},
        "query_string": b"",
    }
    asyncio.run(application(seconds=0.05)(scope, never, send))
    assert sent[0]["status"] == 408


def test_every_answer_has_the_headers():
    for path, options in (("/x", {}), ("/x", {"keys": [KEY]}), ("/not-there", {})):
        headers = client(**options).get(path).headers
        assert "script-src" not in headers["content-security-policy"]  # so default-src 'self' holds for scripts
        assert "'unsafe-inline'" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert "access-control-allow-origin" not in headers
