"""The engine: one thread owns the model and runs all questions through its slots (continuous batching).

Between two prefills the slots advance by a few tokens, so that a new question waits for a moment only and tokens can be
shown as they are drawn. All programs have fixed shapes and a row depends on itself alone: who else is asking changes no
answer.
"""

import concurrent.futures
import dataclasses
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from medplib_jax.decode.generator import Generator
from medplib_jax.decode.prefix import join
from medplib_jax.decode.sampling import Sampling, answer_draws
from medplib_jax.decode.slots import Slots
from medplib_jax.decode.stream import stack_rows
from medplib_jax.models.language.attention import KVCache
from medplib_jax.serve.feature_cache import FeatureCache, content_key
from medplib_jax.serve.observe import EngineMetrics
from medplib_jax.serve.questions import Prompt
from medplib_jax.serve.waiting import FairQueue

log = logging.getLogger(__name__)

IDLE_SECONDS = 0.5
# Parts of prompts are padded, so that few programs are compiled: heads to multiples, rests to powers of two from here.
HEAD, REST = 64, 16


@dataclasses.dataclass
class Question:
    """One question on its way through the engine, which calls `report` from threads of its own.

    The last call gets an `Ended`; those before, which come only when it is `streamed`, the tokens drawn so far.
    """

    client: str
    prompt: Prompt
    limit: int  # most tokens of the answer
    sampling: Sampling
    seed: int
    report: Callable[["list[int] | Ended"], None]
    streamed: bool
    deadline: float  # of time.monotonic()
    arrived: float = dataclasses.field(default_factory=time.monotonic)
    cancelled: bool = False
    shown: int = 0  # tokens that were reported

    def cancel(self) -> None:
        """Gives up; the slot is free at the engine's next turn."""
        self.cancelled = True

    @property
    def shape(self) -> tuple[int, int, int]:
        """Positions of the prompt, of its head and of the rest, each with its padding: questions alike run together."""
        (_, length), rest = self.prompt.batch.tokens.shape, REST
        while rest < self.prompt.tokens - self.prompt.head:
            rest *= 2
        return length, min(length, -(-self.prompt.head // HEAD) * HEAD), min(length, rest)

    @property
    def over(self) -> bool:
        return self.cancelled or time.monotonic() > self.deadline

    @property
    def given_up(self) -> "Ended":
        """The end of a question that is over."""
        return Ended("cancelled" if self.cancelled else "timeout")


@dataclasses.dataclass(frozen=True)
class Ended:
    """The end of an answer. `reason`: stop, length, cancelled, timeout, or error."""

    reason: str
    tokens: tuple[int, ...] = ()
    mask_logits: np.ndarray | None = None  # float32 [m, h, w], one per mask of the answer
    predicted_iou: np.ndarray | None = None  # float32 [m]
    message: str = ""


class Engine:
    """Answers questions. Masks are drawn by a second thread, while the slots go on.

    slots: answers in the making; refill: most prompts that are let in before the slots go on; together: prompts that
    one program runs, filled up where fewer wait; chunk: tokens drawn between two looks at the queue.
    """

    def __init__(
        self,
        generator: Generator,
        metrics: EngineMetrics,
        *,
        longest: int,
        slots: int,
        refill: int,
        together: int,
        chunk: int,
        capacity: int,
        cache_bytes: int,
    ):
        self.generator, self.metrics = generator, metrics
        self._longest, self._refill, self._together, self._chunk = longest, refill, together, chunk
        self.waiting = FairQueue(capacity)
        self._asked: list[Question | None] = [None] * slots
        self._state: Slots | None = None
        self._clip, self._sam = FeatureCache(cache_bytes // 4), FeatureCache(cache_bytes // 4)  # a thread each
        self._heads = FeatureCache(cache_bytes // 2)
        self._closing, self.ready = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._drawing = concurrent.futures.ThreadPoolExecutor(1, "masks")
        self._room = threading.Semaphore(capacity)  # of answers that wait for masks; more of them hold the slots up

    def start(self, example: Prompt) -> None:
        """Begins to answer. Whatever questions of the length of `example` need is compiled first."""
        self._example = example
        self._thread.start()

    def submit(self, question: Question) -> bool:
        """False when the queue is full, or when the engine is closing or has failed."""
        return not self._closing.is_set() and self._thread.is_alive() and self.waiting.put(question)

    def close(self, seconds: float) -> None:
        """Takes no more questions and waits until those in the slots are answered, at most that long."""
        self._closing.set()
        self._thread.join(seconds)

    @property
    def status(self) -> str:
        """ok, loading or down."""
        return "down" if not self._thread.is_alive() else "ok" if self.ready.is_set() else "loading"

    @property
    def busy(self) -> int:
        """Slots in which an answer is being made."""
        return sum(question is not None for question in self._asked)

    def _run(self) -> None:
        self._warm_up()
        self.ready.set()
        while not (self._closing.is_set() and not self.busy):
            try:
                self._turn()
            except Exception as error:
                log.exception("the engine failed; its questions are given back")
                self._give_back(f"{type(error).__name__}: {error}")
        for question in self.waiting.take(len(self.waiting)):
            question.report(Ended("error", message="the server is shutting down"))
        self._drawing.shutdown()

    def _warm_up(self) -> None:
        """Runs one question as far as its first token, and draws a mask where the model can."""
        question = Question("", self._example, 1, Sampling(), 0, lambda new: None, False, float("inf"))
        self._prefill([(question, 0)])
        self._state, _ = self.generator.peek(self._state)
        self._state, seg_hidden, _ = self.generator.advance(self._state, keep=0, steps=self._chunk)
        if seg_hidden.shape[1]:
            viewed = self.generator.view(self._example.batch)
            jax.block_until_ready(self.generator.masks(seg_hidden[:1], self._example.batch, viewed))

    def _give_back(self, message: str) -> None:
        """Ends everything in the slots, whose state on the device may be lost."""
        for question in filter(None, self._asked):
            question.report(Ended("error", message=message))
        self._asked, self._state = [None] * len(self._asked), None

    def _turn(self) -> None:
        self._release()
        if not self._closing.is_set():
            self._admit()
        self.metrics.observe(len(self.waiting), self.busy)
        if not self.busy:
            self.waiting.wait(IDLE_SECONDS)
            return
        self._advance()

    def _release(self) -> None:
        """Empties the slots of those who have given up."""
        gone = [slot for slot, question in enumerate(self._asked) if question is not None and question.over]
        for slot in gone:
            question, self._asked[slot] = self._asked[slot], None
            question.report(question.given_up)
        if gone:
            self._state = self.generator.release(self._state, np.array([q is not None for q in self._asked]))

    def _admit(self) -> None:
        """Runs waiting prompts of one length and puts them into free slots."""
        free = [slot for slot, question in enumerate(self._asked) if question is None][: self._refill]
        questions = []
        for question in self.waiting.take(len(free)) if free else ():
            if question.over:
                question.report(question.given_up)
            else:
                questions.append(question)
        placed = list(zip(questions, free, strict=False))
        for question, slot in placed:  # before anything can fail, so that each of them is given back then
            self._asked[slot] = question
            self.metrics.admitted(question)
        for _, alike in itertools.groupby(sorted(placed, key=_shape), key=_shape):
            while chosen := list(itertools.islice(alike, self._together)):
                self._prefill(chosen)

    def _prefill(self, placed: Sequence[tuple[Question, int]]) -> None:
        """Runs at most `together` prompts of one shape."""
        questions, slots = zip(*placed, strict=True)
        fillers = [None] * (self._together - len(questions))
        index = np.array([*slots, *[len(self._asked)] * len(fillers)], np.int32)[None]
        rows = stack_rows([*[question.prompt.batch for question in questions], *fillers])
        features = [self._clip_features(question.prompt) for question in questions]
        features += [features[0]] * len(fillers)
        heads = [self._head(question) for question in questions] if questions[0].prompt.head else []
        heads += heads[:1] * len(fillers)
        self._state = self.generator.start(
            self._state,
            rows,
            np.array([*[question.limit for question in questions], *[0] * len(fillers)], np.int32),
            answer_draws(
                [*[question.sampling for question in questions], *[Sampling()] * len(fillers)],
                [*[question.seed for question in questions], *[0] * len(fillers)],
                [0] * self._together,
            ),
            index,
            len(self._asked),
            self._longest,
            join(features),
            join(heads) if heads else None,
            questions[0].shape[2],
        )

    def _clip_features(self, prompt: Prompt) -> jax.Array:
        return self._clip.get(prompt.pictures, lambda: self.generator.see(prompt.batch))

    def _head(self, question: Question) -> KVCache:
        """Keys and values of the prompt up to its last picture's end."""
        prompt, room = question.prompt, question.shape[1]
        batch, head = prompt.batch, prompt.head
        key = content_key(batch.tokens[:, :head], batch.feature_index[:, :head]) + prompt.pictures
        lengths = np.array([head], np.int32)
        return self._heads.get(key, lambda: self.generator.begin(batch, lengths, room, self._clip_features(prompt)))

    def _advance(self) -> None:
        """Draws tokens, reports what is new, and ends what has ended.

        While questions wait, the slots go on until there is room for as many as are let in together.
        """
        self._show_first()
        keep = len(self._asked) - self._refill if len(self.waiting) and self.busy == len(self._asked) else 0
        self._state, seg_hidden, mask_valid = self.generator.advance(self._state, keep, self._chunk)
        state = self._state
        active, tokens, lengths, valid = jax.device_get((state.active, state.tokens, state.lengths, mask_valid))
        ended = []
        for slot, question in enumerate(self._asked):
            if question is None:
                continue
            drawn = tokens[slot, : lengths[slot]].tolist()
            self.metrics.drew(question, len(drawn))
            if active[slot] and question.streamed:
                question.report(drawn)
            elif not active[slot]:
                ended.append((question, drawn, slot))
        hidden = jax.device_get(seg_hidden) if any(valid[slot].any() for *_, slot in ended) else None
        for question, drawn, slot in ended:
            self._asked[slot] = None
            end = Ended("length" if len(drawn) >= question.limit else "stop", tuple(drawn))
            if valid[slot].any():
                self._room.acquire()
                self._drawing.submit(self._draw, question, end, hidden[slot : slot + 1], valid[slot])
            else:
                question.report(end)

    def _show_first(self) -> None:
        """Reports first tokens before they are run through the decoder."""
        begin = [i for i, question in enumerate(self._asked) if question and question.streamed and not question.shown]
        if not begin:
            return
        self._state, tokens = self.generator.peek(self._state)
        tokens = jax.device_get(tokens).tolist()
        for slot in begin:
            if tokens[slot] >= 0:
                question = self._asked[slot]
                self.metrics.drew(question, 1)
                question.report([tokens[slot]])

    def _draw(self, question: Question, end: Ended, seg_hidden: np.ndarray, valid: np.ndarray) -> None:
        """Reports the answer with its masks, and makes room for those of another."""
        try:
            if question.over:
                question.report(question.given_up)
                return
            prompt = question.prompt.batch
            viewed = self._sam.get(question.prompt.pictures, lambda: self.generator.view(prompt))
            drawn = self.generator.masks(seg_hidden, prompt, viewed)
            logits, predicted_iou = (each[0, valid] for each in jax.device_get(drawn))
            question.report(dataclasses.replace(end, mask_logits=logits, predicted_iou=predicted_iou))
        except Exception as error:
            log.exception("masks could not be drawn")
            question.report(Ended("error", message=f"{type(error).__name__}: {error}"))
        finally:
            self._room.release()


def _shape(placed: tuple[Question, int]) -> tuple[int, int, int]:
    return placed[0].shape
