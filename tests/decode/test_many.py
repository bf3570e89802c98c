"""Many questions at once: each answer as if it had been asked alone."""

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.decode.many import answer_questions
from medplib_jax.decode.predictor import Predictor, read_question
from medplib_jax.decode.sampling import Sampling


def picture(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (20 + seed, 30, 3), np.uint8)


def test_answers_are_those_of_single_questions(workdir):
    predictor = Predictor(workdir, max_new_tokens=8)
    given = {
        3: (picture(1), "Where is the lung?"),
        5: (picture(2), "What is <region>?", "box:2,3,12,15"),
        8: (picture(3), "Where is the lung? " * 20),
        9: (picture(4), "What organ?"),
    }
    found = dict(answer_questions(predictor, {n: read_question(*one) for n, one in given.items()}, 0))
    assert found.keys() == given.keys()
    for number, one in given.items():
        alone = predictor(*one)
        assert found[number].answer == alone.answer and len(found[number].masks) == len(alone.masks)
        for mine, its in zip(found[number].masks, alone.masks, strict=True):
            np.testing.assert_array_equal(mine, its)


def test_a_sampled_answer_does_not_depend_on_what_else_is_asked(workdir):
    predictor = Predictor(workdir, max_new_tokens=8, sampling=Sampling(1.5, 1.0))
    asked = {number: read_question(picture(number), "Where is the lung?") for number in range(5)}
    together = dict(answer_questions(predictor, asked, 1))
    (alone,) = answer_questions(predictor, {3: asked[3]}, 1)
    assert alone[1].answer == together[3].answer
    assert len({found.answer for found in together.values()}) > 1


def test_a_question_that_is_too_long_is_named_and_the_others_are_answered(workdir):
    predictor = Predictor(workdir, max_new_tokens=4)
    asked = {0: read_question(picture(1), "word " * 2000), 1: read_question(picture(2), "What organ?")}
    found = dict(answer_questions(predictor, asked, 0))
    assert isinstance(found[0], DataError) and found[1].answer is not None
