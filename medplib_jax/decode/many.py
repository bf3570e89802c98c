"""Answers to many questions about pictures, as they end, by continuous batching."""

import collections
from collections.abc import Iterator, Mapping

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.data import boxes
from medplib_jax.data.errors import DataError
from medplib_jax.decode.predictor import Prediction, Predictor, Question, with_boxes
from medplib_jax.decode.stream import lanes_for, stream_answers


def answer_questions(
    predictor: Predictor, asked: Mapping[int, Question], seed: int
) -> Iterator[tuple[int, Prediction | DataError]]:
    """(number, answer, or what is wrong with the question) as answers end.

    A number also says which draws a sampled answer gets, whatever else is asked.
    """
    prompts: dict[int, list[Batch]] = collections.defaultdict(list)  # by length
    for number, prompt in _prompts(predictor, asked):
        if isinstance(prompt, DataError):
            yield number, prompt
        else:
            prompts[prompt.tokens.shape[1]].append(prompt)
    for alike in prompts.values():
        slots = min(predictor.slots, len(alike))
        answers = stream_answers(
            predictor.generator,
            alike,
            slots=slots,
            refill=max(1, slots // 2),
            lanes=lanes_for(predictor.params, slots),
            seed=seed,
        )
        for prompt, generation in answers:
            number = int(prompt.record[0])
            picture = asked[number].picture
            text, masks, ious = predictor.read(picture.shape[:2], prompt, generation)
            found = None if predictor.draws_masks else tuple(boxes.read(text))
            yield number, Prediction(text, masks, ious, picture, found, bool(generation.cut_off[0]))


def _prompts(predictor: Predictor, asked: Mapping[int, Question]) -> Iterator[tuple[int, Batch | DataError]]:
    """One row each, of the same shapes but for their length."""
    regions = max((question.regions for question in asked.values()), default=0) if predictor.draws_masks else 0
    for number, question in asked.items():
        try:
            question = question if predictor.draws_masks else with_boxes(question)
            arrays, _ = predictor.loader([question.record], regions).load_eval([0], [0], question=True)
            yield number, Batch(**arrays | {"record": np.array([number], np.int32)})
        except DataError as error:
            yield number, error
