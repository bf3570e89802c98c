"""MedEvalKit's calls, made here as its data sets make them, give the answers of `predict`."""

import argparse

import numpy as np
import pytest
from PIL import Image

from launch.suites.medevalkit import MedplibModel
from medplib_jax.decode.predictor import Predictor

ARGS = argparse.Namespace(temperature=0, top_p=0.0001, repetition_penalty=1, max_new_tokens=4, seed=42)


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 255, (30 + k, 40, 3), np.uint8)) for k in range(count)]


@pytest.mark.slow
def test_answers_are_those_of_predict(workdir):
    model, predictor = MedplibModel(str(workdir), ARGS), Predictor(workdir, max_new_tokens=4)
    asked = [{"prompt": f"What organ is {k}?", "image": one} for k, one in enumerate(pictures(3))]
    asked.append({"system": "Be brief.", "prompt": "What is it?", "images": pictures(1)})
    expected = [predictor(one["image"], one["prompt"]).answer for one in asked[:3]]
    expected.append(predictor(pictures(1)[0], "Be brief.\nWhat is it?").answer)
    assert model.generate_outputs(asked) == expected
    assert model.generate_output(asked[1]) == expected[1]


def test_what_cannot_be_asked_is_named(workdir):
    model = MedplibModel(str(workdir), ARGS)
    for messages in ({"prompt": "What?"}, {"prompt": "What?", "images": pictures(2)}, {"messages": []}):
        with pytest.raises(ValueError, match="expected a prompt and one picture, found"):
            model.generate_outputs([messages])
    with pytest.raises(ValueError, match="repetition_penalty 1.2: expected 1"):
        MedplibModel(str(workdir), argparse.Namespace(repetition_penalty=1.2))
