"""A checkpoint ready to answer questions about single pictures."""

import dataclasses
import os
import re

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Batch, Params
from medplib_jax.checkpoint import load_params
from medplib_jax.data.images import load_image
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.decode.sampling import Sampling

_PLACEHOLDER = re.compile(r"<region>(?:\s*</region>)?")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """`masks`: boolean [h, w] of the picture's size, one per <SEG> of the answer that has a mask slot; `picture`: RGB uint8 [h, w, 3]."""

    answer: str
    masks: tuple[np.ndarray, ...]
    predicted_iou: tuple[float, ...]
    picture: np.ndarray


class Predictor:
    """A checkpoint ready to answer. Compiles anew for each prompt bucket and each picture size. `quantize`: "int8" for weights of 8 bits.

    What is None comes from the experiment's `eval`. Answers hold at most `data.max_masks` masks, but never fewer than one.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike,
        *,
        max_new_tokens: int | None = None,
        mask_threshold: float | None = None,
        sampling: Sampling = Sampling(),
        quantize: str = "",
    ):
        experiment, params, tokenizer_dir = load_params(str(checkpoint_dir))
        given = {"max_new_tokens": max_new_tokens, "mask_threshold": mask_threshold}
        self._eval = dataclasses.replace(
            experiment.eval, **{name: value for name, value in given.items() if value is not None}
        )
        self._data, self._model = dataclasses.replace(experiment.data, on_error="raise"), experiment.model
        self._tokenizer = Tokenizer.load(tokenizer_dir)
        self._generator = Generator(
            self._model,
            jax.tree.map(jnp.asarray, params),
            eos_id=self._tokenizer.eos_id,
            seg_id=self._tokenizer.seg_id,
            max_new_tokens=self._eval.max_new_tokens,
            max_masks=max(1, self._data.max_masks),
            sampling=sampling,
            quantize=quantize,
        )

    @property
    def params(self) -> Params:
        """The checkpoint's parameters, laid out for decoding."""
        return self._generator.params

    def __call__(self, image: str | os.PathLike, question: str, region: str = "", seed: int = 0) -> Prediction:
        """The answer to a question; see `prompt`."""
        picture, prompt = self.prompt(image, question, region)
        return self.answer(picture, prompt, seed)

    def prompt(self, image: str | os.PathLike, question: str, region: str = "") -> tuple[np.ndarray, Batch]:
        """The picture (RGB uint8 [h, w, 3]) and the model's input.

        region: "point:x,y", "box:x0,y0,x1,y1", "polygon:x,y ...", "scribble:x,y ..." in pixels, or the path of a mask file; empty for none.
        Raises DataError for a picture, region or question that cannot be used, ValueError when region and `<region>` do not match.
        """
        picture = load_image(os.fspath(image))
        text = place_region(question, region)
        record = Record(
            "command line",
            0,
            "/",
            (os.path.abspath(image),),
            (("human", text if "<image>" in text else f"<image>\n{text}"),),
        )
        slots = {"max_images": 1, "max_regions": int(bool(region)), "max_masks": 0}
        data = dataclasses.replace(self._data, mask_canvas=max(picture.shape[:2]), **slots)
        arrays, _ = Loader([[record]], self._tokenizer, data, self._model).load_eval([0], [0], question=True)
        return picture, Batch(**arrays)

    def answer(self, picture: np.ndarray, prompt: Batch, seed: int = 0) -> Prediction:
        """The answer to a prompt made from this picture."""
        generation = jax.device_get(self._generator(prompt, seed))
        drawn = generation.mask_valid[0]
        masks = ()
        if drawn.any():
            height, width = picture.shape[:2]
            draw = mask_drawer(
                self._model.mask.image_size, self._model.mask.unpad, max(height, width), self._eval.mask_threshold
            )
            masks = tuple(draw(prompt, generation)[0, drawn, :height, :width])
        text = self._tokenizer.decode(generation.tokens[0, : generation.lengths[0]]).strip()
        return Prediction(text, masks, tuple(generation.predicted_iou[0, drawn].tolist()), picture)


def place_region(question: str, region: str) -> str:
    """The question with the region in place of its `<region>`, or behind it. ValueError for a place without a region or several places."""
    places = len(_PLACEHOLDER.findall(question))
    if places > 1 or places > bool(region):
        expected = "at most 1" if region else "none, as no region is given"
        raise ValueError(f"question {question!r} has {places} <region>, expected {expected}")
    reference = f"<region>{region}</region>"
    if places:
        return _PLACEHOLDER.sub(lambda _: reference, question)
    return f"{question} {reference}" if region else question
