"""What the engine does around the model's programs: which prompts run together, and what a failure leaves."""

import dataclasses
import types

import numpy as np
import pytest

from medplib_jax.decode.sampling import GREEDY
from medplib_jax.serve.engine import Ended, Engine, Question
from medplib_jax.serve.observe import ServerMetrics
from medplib_jax.serve.questions import Prompt


def question(length: int, head: int, tokens: int, report=print) -> Question:
    prompt = Prompt(types.SimpleNamespace(tokens=np.zeros((1, length))), None, tokens, head, b"none")
    return Question("a", prompt, 4, GREEDY, 0, report, streamed=False, deadline=float("inf"))


@pytest.mark.parametrize(
    ("length", "head", "tokens", "shape"),
    [(128, 97, 108, (128, 128, 16)), (256, 130, 171, (256, 192, 64)), (128, 97, 113, (128, 128, 16))],
)
def test_behind_a_kept_beginning_only_the_rest_is_run(length, head, tokens, shape):
    assert question(length, head, tokens).shape == shape


def engine_of(generator) -> Engine:
    return Engine(
        generator,
        ServerMetrics().of_engine("x"),
        longest=1,
        slots=1,
        refill=1,
        together=1,
        chunk=1,
        capacity=1,
        cache_bytes=4,
    )


def view(prompt):
    raise MemoryError("no room")


def test_masks_that_cannot_be_drawn_end_their_question_alone():
    engine, told = engine_of(types.SimpleNamespace(view=view)), []
    engine._draw(question(4, 0, 4, told.append), Ended("stop", (1,)), np.zeros((1, 1, 1)), np.array([True]))
    assert told == [Ended("error", message="MemoryError: no room")]


def test_the_slots_wait_while_as_many_answers_wait_for_masks_as_questions_may_wait():
    """Else answers pile up without a bound, and none of them minds its deadline."""
    state = types.SimpleNamespace(active=np.array([False]), tokens=np.ones((1, 4), int), lengths=np.array([1]))
    hidden, valid = np.zeros((1, 1, 1)), np.array([[True]])
    engine = engine_of(types.SimpleNamespace(view=view, advance=lambda *_: (state, hidden, valid)))
    waiting, told = [], []
    engine._drawing = types.SimpleNamespace(submit=lambda *call: waiting.append(call))
    engine._asked[0] = question(4, 0, 4, told.append)
    engine._advance()
    assert not told and not engine._room.acquire(blocking=False)
    draw, late, *drawn = waiting.pop()
    draw(dataclasses.replace(late, deadline=0.0), *drawn)
    assert told == [Ended("timeout")] and engine._room.acquire(blocking=False)
