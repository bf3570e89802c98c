"""A client of the OpenAI-compatible chat API. Threads share it.

Answers are kept on disk, failures are tried again, everything is counted.
"""

import collections
import dataclasses
import hashlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import requests
from urllib3.exceptions import HTTPError, InvalidHeader, NewConnectionError, TimeoutError
from urllib3.util import Retry

from medplib_jax.datasets.files import write_json

Message = dict[str, str]  # role, content
TRIES = 7  # of one request
LONGEST_WAIT = 600.0  # seconds that a server may ask to wait
CONNECT = 10.0  # seconds until a server must have accepted the connection
MAX_BYTES = 2**24  # of a response
_PASSING = (408, 409, 425, 429)  # and all from 500
_FAILED = "failed: "
_HOPELESS = (401, 402, 403, 404, 405)  # no other request will do better


class EndpointError(RuntimeError):
    """No request will be answered: nobody is there, or the key, the address or the model is wrong."""


class NoAnswer(RuntimeError):
    """This one request was not answered."""


class _Failure(Exception):
    """One try failed, and another may not. `wait`: the seconds that the server asked for."""

    def __init__(self, kind: str, detail: str, wait: float | None = None):
        super().__init__(detail)
        self.kind, self.wait = kind, wait


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Where a model answers.

    url: up to the version ("http://localhost:8000/v1"). extra: further fields of every request (temperature, ...).
    """

    url: str
    model: str
    key: str = dataclasses.field(default="", repr=False)
    extra: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    timeout: float = 300.0  # seconds for a whole response
    backoff: float = 1.0  # seconds before the second try; doubled for each further one

    def __post_init__(self):
        if not re.match(r"https?://[^/]", self.url):
            raise ValueError(f"endpoint: expected an address such as http://localhost:8000/v1, found {self.url!r}")
        if not self.model:
            raise ValueError("model: expected the name of a model, found none")
        if not isinstance(self.extra, Mapping):
            raise ValueError(f"request: expected a JSON object, found {self.extra!r}")
        if not self.timeout > 0:
            raise ValueError(f"timeout: expected seconds, found {self.timeout}")

    @property
    def address(self) -> str:
        return self.url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


class Chat:
    """Asks an endpoint.

    `cache` is a folder in which every answer is kept by its request, so that none is paid for twice.
    """

    def __init__(self, endpoint: Endpoint, cache: str):
        self._endpoint, self._cache = endpoint, cache
        self._threads = (
            threading.local()
        )  # a session each, because requests does not promise that threads can share one
        self._guard = threading.Lock()
        self._under_way: dict[str, threading.Lock] = {}
        self._stopped = threading.Event()
        # answers_paid, answers_from_disk, prompt_tokens, completion_tokens (both of paid answers), what callers count,
        # failed tries by kind
        self.counts: collections.Counter[str] = collections.Counter()

    def ask(self, messages: Sequence[Message]) -> str:
        """The answer's text, from disk when this was asked before.

        NoAnswer when all tries failed, EndpointError when no request can succeed.
        """
        request = {"model": self._endpoint.model, "messages": list(messages), **self._endpoint.extra}
        key = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        path = os.path.join(self._cache, key[:2], f"{key[2:]}.json")
        with self._guard:
            one_at_a_time = self._under_way.setdefault(key, threading.Lock())
        try:
            with one_at_a_time:
                answer = _read(path)
                if answer is None:
                    answer = self._post(request)
                    write_json(path, {"request": request, "answer": answer})
                else:
                    self.count(answers_from_disk=1)
        finally:
            with self._guard:
                self._under_way.pop(key, None)
        return answer["text"]

    def reach(self) -> None:
        """Returns when anybody listens at the address, whatever the answer; else EndpointError, within seconds."""
        address = self._endpoint.address.removesuffix("/chat/completions") + "/models"
        options = {"timeout": CONNECT, "allow_redirects": False, "stream": True}
        try:
            self._session().get(address, auth=self._authorize, **options).close()
        except requests.exceptions.ReadTimeout:
            return  # it is there, and busy
        except requests.exceptions.RequestException as error:
            raise EndpointError(f"{address}: nobody answers ({error})") from error

    def failures(self) -> dict[str, int]:
        """How many tries failed, by kind."""
        with self._guard:
            return {
                name.removeprefix(_FAILED): count
                for name, count in sorted(self.counts.items())
                if name.startswith(_FAILED)
            }

    def stop(self) -> None:
        """Nothing is tried again from now on, and those that wait for their next try give up."""
        self._stopped.set()

    def count(self, **counts: int) -> None:
        with self._guard:
            self.counts.update(counts)

    def _post(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer as `_parse` gives it."""
        for number in range(TRIES):
            try:
                answer = self._try(request)
            except _Failure as failure:
                self.count(**{_FAILED + failure.kind: 1})
                last = failure
                backoff = (
                    self._endpoint.backoff * 2**number * random.uniform(0.5, 1)
                )  # apart, lest all come back at one moment
                if number + 1 == TRIES or self._stopped.wait(backoff if failure.wait is None else failure.wait):
                    break
                continue
            self.count(
                answers_paid=1, prompt_tokens=answer["prompt_tokens"], completion_tokens=answer["completion_tokens"]
            )
            return answer
        raise NoAnswer(f"{number + 1} tries; the last: {last.kind} ({last})")

    def _try(self, request: dict[str, Any]) -> dict[str, Any]:
        endpoint, deadline = self._endpoint, time.monotonic() + self._endpoint.timeout
        options = {
            "timeout": (min(CONNECT, endpoint.timeout), endpoint.timeout),
            "stream": True,
            "allow_redirects": False,
        }
        try:
            with self._session().post(endpoint.address, json=request, auth=self._authorize, **options) as response:
                status, body = response.status_code, _body(response, deadline)
        except (requests.exceptions.InvalidURL, requests.exceptions.MissingSchema) as error:
            raise EndpointError(f"{endpoint.address}: {error}") from error
        except requests.exceptions.ConnectTimeout as error:
            if not self.counts["answers_paid"]:
                raise EndpointError(f"{endpoint.address}: nobody answers within {CONNECT:g} s") from error
            raise _Failure("connection failed", str(error)) from error
        except (requests.exceptions.Timeout, TimeoutError) as error:
            raise _Failure("no answer in time", f"{endpoint.timeout:g} s") from error
        except (requests.exceptions.RequestException, HTTPError, OSError) as error:
            if not self.counts["answers_paid"] and _is_refused(error):
                raise EndpointError(f"{endpoint.address}: nobody answers ({error})") from error
            raise _Failure("connection failed", str(error)) from error
        if status == 200:
            return _parse(body)
        said = f"HTTP {status}: {body[:300].decode(errors='replace')}"
        if response.is_redirect:
            said += f"; it leads to {response.headers['Location']}, give that address if you trust it"
        if status in _HOPELESS or response.is_redirect:
            raise EndpointError(f"{endpoint.address} answers {said}")
        if status in _PASSING or status >= 500:
            raise _Failure(f"HTTP {status}", said, _seconds(response.headers.get("Retry-After")))
        raise NoAnswer(said)

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Adds the key alone. Such a function keeps the library from looking for passwords in ~/.netrc."""
        if self._endpoint.key:
            request.headers["Authorization"] = f"Bearer {self._endpoint.key}"
        return request

    def _session(self) -> requests.Session:
        if not hasattr(self._threads, "session"):
            self._threads.session = requests.Session()
        return self._threads.session


def _is_refused(error: Exception) -> bool:
    """Whether nobody accepted the connection: no such host, or no server at that port."""
    return isinstance(getattr(error.args[0] if error.args else None, "reason", None), NewConnectionError)


def _read(path: str) -> dict[str, Any] | None:
    """A kept answer; None when there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file)["answer"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _body(response: requests.Response, deadline: float) -> bytes:
    """The whole body, however slowly it comes, until the deadline."""
    body = b""
    while part := response.raw.read1(2**16, decode_content=True):
        body += part
        if time.monotonic() > deadline:
            raise requests.exceptions.Timeout
        if len(body) > MAX_BYTES:
            raise _Failure("not a chat completion", f"more than {MAX_BYTES} bytes")
    return body


def _parse(body: bytes) -> dict[str, Any]:
    """text, prompt_tokens, completion_tokens of a chat completion; tokens are 0 where the server counts none."""
    try:
        value = json.loads(body)
        text = value["choices"][0]["message"]["content"] or ""
        usage = value.get("usage") or {}
        counts = {name: int(usage.get(name) or 0) for name in ("prompt_tokens", "completion_tokens")}
        if not isinstance(text, str):
            raise TypeError(type(text).__name__)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise _Failure("not a chat completion", body[:300].decode(errors="replace")) from error
    return {"text": text, **counts}


def _seconds(retry_after: str | None) -> float | None:
    """What a Retry-After header asks for, a number or a date."""
    try:
        return None if retry_after is None else min(LONGEST_WAIT, Retry().parse_retry_after(retry_after))
    except InvalidHeader:
        return None
