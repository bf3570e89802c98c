"""One question from the network to the engine and back, as an asynchronous stream of what is new."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Sequence

from medplib_jax.decode.masks import mask_labels
from medplib_jax.decode.sampling import Sampling
from medplib_jax.serve.answers import AnswerText
from medplib_jax.serve.engine import Ended, Engine, Question
from medplib_jax.serve.model import ServedModel
from medplib_jax.serve.pictures import describe_mask
from medplib_jax.serve.questions import Message, Region
from medplib_jax.serve.refusals import Refused

GRACE_SECONDS = 10.0  # beyond the time of an answer, after which the engine itself gives it up


@dataclasses.dataclass(frozen=True)
class Wish:
    """What a client asks for, checked."""

    messages: Sequence[Message]
    regions: Sequence[Region]
    max_tokens: int | None
    sampling: Sampling
    seed: int
    stops: tuple[str, ...]
    stream: bool


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of an answer. The last one has a `reason` (stop or length), masks or boxes, and the counts of tokens."""

    text: str
    reason: str = ""
    masks: tuple[dict, ...] = ()
    boxes: tuple[dict, ...] = ()
    prompt_tokens: int = 0
    answer_tokens: int = 0


class Asker:
    """Puts questions to the engine."""

    def __init__(self, engine: Engine, model: ServedModel, seconds: float):
        self._engine, self.model, self._seconds = engine, model, seconds

    async def ask(self, wish: Wish, client: str) -> AsyncIterator[Piece]:
        """The answer, piece by piece. Refused before the first piece: what cannot be asked, or a full queue.

        Leaving the iteration cancels the question.
        """
        prompt = await asyncio.to_thread(self.model.make_prompt, wish.messages, wish.regions)
        most = self.model.generator.options.max_new_tokens
        limit = min(wish.max_tokens or most, most)
        loop, news = asyncio.get_running_loop(), asyncio.Queue()
        question = Question(
            client,
            prompt,
            limit,
            wish.sampling,
            wish.seed,
            report=lambda new: loop.call_soon_threadsafe(news.put_nowait, new),
            streamed=wish.stream or bool(wish.stops),
            deadline=time.monotonic() + self._seconds,
        )
        if not self._engine.submit(question):
            raise Refused(
                429, "too many questions are waiting; try again soon", retry_after=1 + len(self._engine.waiting) // 8
            )
        text = AnswerText(self.model.tokenizer.decode, wish.stops)
        try:
            while True:
                new = await self._next(news)
                if isinstance(new, Ended):
                    yield await asyncio.to_thread(self._last, new, text, prompt)
                    return
                shown = text.update(new, ended=False)
                if text.stopped:
                    boxes = self.model.boxes(text.text, prompt.size)
                    yield Piece(shown, "stop", (), boxes, prompt.tokens, len(new))
                    return
                if shown:
                    yield Piece(shown)
        finally:
            question.cancel()

    async def _next(self, news: asyncio.Queue) -> "list[int] | Ended":
        """What the engine reports. An engine that reports nothing for so long has failed."""
        try:
            return await asyncio.wait_for(news.get(), self._seconds + GRACE_SECONDS)
        except TimeoutError:
            return Ended("timeout")

    def _last(self, end: Ended, text: AnswerText, prompt) -> Piece:
        if end.reason not in ("stop", "length"):
            status = {"timeout": 504, "cancelled": 499}.get(end.reason, 500)
            raise Refused(status, end.message or f"the answer was given up ({end.reason})")
        shown = text.update(end.tokens, ended=True)
        masks: tuple[dict, ...] = ()
        if not text.stopped:
            drawn, predicted_iou = self.model.masks(end, prompt)
            masks = tuple(map(describe_mask, drawn, mask_labels(text.text), predicted_iou))
        boxes = self.model.boxes(text.text, prompt.size)
        reason = "stop" if text.stopped else end.reason
        return Piece(shown, reason, masks, boxes, prompt.tokens, len(end.tokens))


def new_id(prefix: str) -> str:
    """An identifier that nobody can guess."""
    return f"{prefix}-{secrets.token_urlsafe(18)}"
