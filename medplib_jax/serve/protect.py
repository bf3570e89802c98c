"""What stands between the network and the routes:

Who may ask, how large and how slow a request may be, what a browser may do.
"""

import asyncio
import base64
import dataclasses
import hashlib
import hmac
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from medplib_jax.serve.refusals import Refused

OPEN_PATHS = ("/healthz",)
POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; connect-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Keys:
    """The keys that open the server; none: everybody may come in."""

    def __init__(self, keys: Sequence[str]):
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def admits(self, key: str) -> bool:
        """Compares with every key in constant time."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        return any([hmac.compare_digest(digest, known) for known in self._digests])


def given_key(headers: Headers) -> str:
    """The key of an `Authorization` header:

    A bearer token (API clients), or the password of basic authentication (browsers).
    """
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return value.strip() if scheme.lower() == "bearer" else ""


@dataclasses.dataclass(frozen=True)
class BodyLimit:
    """The most bytes that a body may have, and the seconds in which it has to arrive."""

    bytes: int
    seconds: float


class Guard:
    """ASGI middleware: keys, the size of bodies and the time they may take, and the headers of every answer.

    Bodies are read before the application is asked, but for `uploads`, paths and beginnings of paths (those that end
    with "/"), whose larger bodies pass through piece by piece.
    """

    def __init__(self, app: ASGIApp, keys: Keys, body: BodyLimit, upload: BodyLimit, uploads: Sequence[str]):
        self._app, self._keys, self._body, self._upload, self._uploads = app, keys, body, upload, uploads

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        key = given_key(headers)
        client = scope["client"][0] if scope["client"] else ""
        scope["state"]["client"] = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest() if key else client

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        if self._keys and scope["path"] not in OPEN_PATHS and not self._keys.admits(key):
            challenge = {"WWW-Authenticate": 'Basic realm="medplib_jax (the password is the key)"'}
            await _refuse(Refused(401, "a key is needed"), challenge)(scope, receive, send_with_headers)
            return
        streamed = any(
            scope["path"] == path or (path[-1] == "/" and scope["path"].startswith(path)) for path in self._uploads
        )
        limited = _limited(receive, headers, self._upload if streamed else self._body)
        try:
            body = None if streamed else await _whole(limited)
        except Refused as refused:
            await _refuse(refused, {})(scope, receive, send_with_headers)
            return
        except ClientDisconnect:
            return
        await self._app(scope, limited if body is None else _replay(body, receive), send_with_headers)


def _limited(receive: Receive, headers: Headers, limit: BodyLimit) -> Receive:
    """The messages of a request until its body is whole. Refused as soon as it is known to be too large or too late."""
    size, whole, deadline = 0, False, time.monotonic() + limit.seconds
    promised = headers.get("content-length", "0")

    async def limited() -> Message:
        nonlocal size, whole
        if whole:
            return await receive()
        if promised.isdigit() and int(promised) > limit.bytes:
            raise Refused(413, f"the request has more than {limit.bytes} bytes")
        try:
            message = await asyncio.wait_for(receive(), deadline - time.monotonic())
        except TimeoutError:
            raise Refused(408, f"the request did not arrive within {limit.seconds:g} s") from None
        size += len(message.get("body", b""))
        if size > limit.bytes:
            raise Refused(413, f"the request has more than {limit.bytes} bytes")
        whole = not message.get("more_body")
        return message

    return limited


async def _whole(receive: Receive) -> bytes:
    """The whole body. ClientDisconnect when the client has gone."""
    chunks = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(chunks)


def _refuse(refused: Refused, headers: dict[str, str]) -> JSONResponse:
    return JSONResponse(refused.as_dict(), refused.status, headers=headers | refused.headers)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read, then whatever comes after it."""
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return waiting.pop() if waiting else await receive()

    return replayed
