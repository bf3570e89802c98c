"""What stands between the network and the routes:

Who may ask, how large and how slow a request may be, what a browser may do.
"""

import asyncio
import base64
import hashlib
import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
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


class Guard:
    """ASGI middleware: keys, the size of bodies and the time they may take, and the headers of every answer."""

    def __init__(self, app: ASGIApp, keys: Keys, max_body: int, body_seconds: float):
        self._app, self._keys, self._max_body, self._body_seconds = app, keys, max_body, body_seconds

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
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self._body_seconds)
        except Refused as refused:
            await _refuse(refused, {"Connection": "close"})(scope, receive, send_with_headers)
            return
        except TimeoutError:
            late = Refused(408, f"the request did not arrive within {self._body_seconds:g} s")
            await _refuse(late, {"Connection": "close"})(scope, receive, send_with_headers)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), send_with_headers)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The whole body; None when the client has gone. Refused as soon as it is known to be too large."""
        too_large = Refused(413, f"the request has more than {self._max_body} bytes")
        if headers.get("content-length", "0").isdigit() and int(headers.get("content-length", "0")) > self._max_body:
            raise too_large
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self._max_body:
                raise too_large
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
