"""Slices of scans, asked through the engine like every other question: jobs and conversations take turns."""

import queue
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from medplib_jax.decode.sampling import GREEDY
from medplib_jax.decode.scans import STRUCTURE, ScanModel, SliceAnswer, SliceRecords
from medplib_jax.serve.engine import Ended, Engine, Question
from medplib_jax.serve.model import ServedModel
from medplib_jax.serve.questions import Prompt
from medplib_jax.volumes.pictures import Pictures

AHEAD = 8  # slices that one job has in the engine
FULL_SECONDS = 0.2  # until a full queue is tried again


def engine_scan_model(engine: Engine, model: ServedModel, seconds: float, client: str) -> ScanModel:
    """Answers slices by the server's engine, each in at most `seconds`, for a `client` of its queue."""

    def answer(
        shown: Pictures, structure: str, question: str, numbers: Sequence[int], seed: int
    ) -> Iterator[SliceAnswer]:
        records = SliceRecords(shown, numbers, question.replace(STRUCTURE, structure))
        size = shown.cut.size
        prompts = ((number, model.make_prompt.of_record(records[i], size)) for i, number in enumerate(numbers))
        for number, prompt, ended in _ask_all(engine, prompts, client, seed, seconds):
            text = model.tokenizer.decode(ended.tokens).strip()
            masks, ious = model.masks(ended, prompt)
            mask = shown.cut.mask_on_plane(np.logical_or.reduce(masks)) if len(masks) else None
            yield SliceAnswer(structure, number, text, mask, float(np.mean(ious)) if len(masks) else 0.0)

    return ScanModel(model.identity, answer)


def _ask_all(
    engine: Engine, prompts: Iterator[tuple[int, Prompt]], client: str, seed: int, seconds: float
) -> Iterator[tuple[int, Prompt, Ended]]:
    """Answers to numbered prompts as they end, `AHEAD` of them in the engine. RuntimeError when one is given up."""
    ended: queue.SimpleQueue = queue.SimpleQueue()
    running: dict[int, tuple[Prompt, Question]] = {}
    waiting = next(prompts, None)
    try:
        while waiting or running:
            while waiting and len(running) < AHEAD:
                number, prompt = waiting
                question = Question(
                    client,
                    prompt,
                    engine.generator.options.max_new_tokens,
                    GREEDY,
                    seed,
                    report=_report(ended, number),
                    streamed=False,
                    deadline=time.monotonic() + seconds,
                )
                if not engine.submit(question):
                    break
                running[number], waiting = (prompt, question), next(prompts, None)
            try:
                number, end = ended.get(timeout=None if len(running) == AHEAD or not waiting else FULL_SECONDS)
            except queue.Empty:
                if engine.status == "down":
                    raise RuntimeError("the engine is down") from None
                continue
            if end.reason not in ("stop", "length"):
                raise RuntimeError(end.message or f"an answer was given up ({end.reason})")
            yield number, running.pop(number)[0], end
    finally:
        for _, question in running.values():
            question.cancel()


def _report(ended: queue.SimpleQueue, number: int) -> Callable[["list[int] | Ended"], None]:
    return lambda new: ended.put((number, new)) if isinstance(new, Ended) else None
