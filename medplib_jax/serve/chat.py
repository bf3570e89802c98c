"""OpenAI's chat interface: `/v1/models` and `/v1/chat/completions`, with regions in, masks and boxes out as extensions.

A field that would change the answer and that this server does not know is refused, not passed over.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from medplib_jax.decode.sampling import Sampling
from medplib_jax.serve.asking import Asker, Piece, Wish, new_id
from medplib_jax.serve.questions import Message, Region
from medplib_jax.serve.refusals import Refused

T = TypeVar("T")
MAX_STOPS, MAX_STOP = 4, 64
# Fields that change no answer.
HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
# Fields of OpenAI's interface and of other servers that change nothing at these values.
NEUTRAL = {
    "n": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logprobs": (False,),
    "logit_bias": ({},),
    "tools": ([],),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "top_logprobs": (0,),
    "top_k": (-1, 0),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "modalities": (["text"],),
}


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The fields that are understood; `regions` is an extension."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    messages: list[Message] = Field(min_length=1, max_length=64)
    regions: list[Region] = Field(default_factory=list, max_length=64)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**31)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None


def wish_of(request: ChatRequest) -> Wish:
    """The checked request. Refused: fields whose values this server cannot serve."""
    for name, value in (request.model_extra or {}).items():
        if value is None or name in HARMLESS:
            continue
        if name not in NEUTRAL:
            raise Refused(400, f"{name} is not known here", name)
        if value not in NEUTRAL[name]:
            raise Refused(400, f"{name} is served at {NEUTRAL[name][0]!r} only", name)
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > MAX_STOPS or not all(0 < len(stop) <= MAX_STOP for stop in stops):
        raise Refused(400, f"expected at most {MAX_STOPS} stop strings of 1 to {MAX_STOP} characters", "stop")
    # greedy unless the client asks for something else: an evaluation that names no temperature has to be reproducible
    sampling = Sampling(request.temperature or 0.0, 1.0 if request.top_p is None else request.top_p)
    limit = request.max_completion_tokens or request.max_tokens
    seed = request.seed or 0
    return Wish(request.messages, request.regions, limit, sampling, seed, tuple(stops), request.stream)


def make_router(askers: Mapping[str, Asker]) -> APIRouter:
    """The routes for models by name; a request that names none is the first one's."""
    router = APIRouter(prefix="/v1", tags=["OpenAI"])

    @router.get("/models")
    def models() -> dict:
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "medplib_jax"} for name in askers]
        return {"object": "list", "data": entries}

    @router.post("/chat/completions")
    async def complete(body: ChatRequest, request: Request):
        name = body.model or next(iter(askers))
        if name not in askers:
            raise Refused(404, f"expected one of the models {', '.join(askers)}, found {body.model!r}", "model")
        pieces = askers[name].ask(wish_of(body), request.state.client)
        head = {"id": new_id("chatcmpl"), "created": int(time.time()), "model": name}
        first = await unless_gone(request, anext(pieces))  # refusals come before the first byte of the answer
        if body.stream:
            wants_usage = bool(body.stream_options and body.stream_options.include_usage)
            return StreamingResponse(stream(first, pieces, head, wants_usage), media_type="text/event-stream")
        text, last = await unless_gone(request, _rest(first, pieces))
        message = {"role": "assistant", "content": text, "masks": list(last.masks), "boxes": list(last.boxes)}
        choice = {"index": 0, "message": message, "finish_reason": last.reason, "logprobs": None}
        return JSONResponse(head | {"object": "chat.completion", "choices": [choice], "usage": usage_of(last)})

    return router


async def unless_gone(request: Request, answer: Awaitable[T]) -> T:
    """The answer. It is given up, and Refused raised, when its client goes away before."""
    wanted, gone = asyncio.ensure_future(answer), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({wanted, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not wanted.done():
            raise Refused(499, "the client has gone")
        return wanted.result()
    finally:
        wanted.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _rest(first: Piece, pieces: AsyncIterator[Piece]) -> tuple[str, Piece]:
    """The text and the last piece of an answer."""
    text, last = first.text, first
    async for last in pieces:
        text += last.text
    return text, last


def usage_of(last: Piece) -> dict[str, int]:
    total = last.prompt_tokens + last.answer_tokens
    return {"prompt_tokens": last.prompt_tokens, "completion_tokens": last.answer_tokens, "total_tokens": total}


async def stream(first: Piece, pieces: AsyncIterator[Piece], head: dict, wants_usage: bool) -> AsyncIterator[str]:
    """Server-sent events in OpenAI's form. An error after the beginning is an event of its own."""

    def event(delta: dict, reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
        return _event(head | {"object": "chat.completion.chunk", "choices": [choice]})

    yield event({"role": "assistant", "content": ""})
    piece = first
    try:
        while True:
            if piece.text:
                yield event({"content": piece.text})
            if piece.reason:
                break
            piece = await anext(pieces)
    except Refused as refused:
        yield _event(refused.as_dict())
        return
    finally:
        await pieces.aclose()
    if piece.masks or piece.boxes:
        yield event({"masks": list(piece.masks), "boxes": list(piece.boxes)})
    yield event({}, piece.reason)
    if wants_usage:
        yield _event(head | {"object": "chat.completion.chunk", "choices": [], "usage": usage_of(piece)})
    yield "data: [DONE]\n\n"


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"
