"""Asks a trained model about one picture, with or without a marked region, and draws the masks of its answer.

COMMAND
    python -m medplib_jax.predict --checkpoint WORKDIR --image scan.png --question "Please segment the liver." --out answer
    python -m medplib_jax.predict --checkpoint WORKDIR --image scan.png --question "What is <region>?" --box 40,60,90,120 --out answer

Prints the answer; writes `mask_<k>.png` (0/255, the picture's size) and `overlay.png`.
"""

import argparse
import dataclasses
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from medplib_jax.batch import Batch, Params
from medplib_jax.checkpoint import load_params
from medplib_jax.data.images import load_image
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode import Generator, Sampling
from medplib_jax.decode_layout import QUANTIZE
from medplib_jax.evaluators.common import mask_drawer
from medplib_jax.parallel.compilation import use_cache
from medplib_jax.report import PALETTE, overlay

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
        self._eval = dataclasses.replace(experiment.eval, **{name: value for name, value in given.items() if value is not None})
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
        record = Record("command line", 0, "/", (os.path.abspath(image),), (("human", text if "<image>" in text else f"<image>\n{text}"),))
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
            draw = mask_drawer(self._model.mask.image_size, self._model.mask.unpad, max(height, width), self._eval.mask_threshold)
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


def write_prediction(prediction: Prediction, out_dir: str | os.PathLike) -> list[Path]:
    """Writes the masks and the overlay as PNG files, and returns their paths."""
    out = Path(out_dir)
    out.mkdir(parents=True, exist_ok=True)
    pictures = {f"mask_{k}.png": mask.astype(np.uint8) * 255 for k, mask in enumerate(prediction.masks)}
    pictures["overlay.png"] = overlay(prediction.picture, prediction.masks, PALETTE)
    for name, pixels in pictures.items():
        Image.fromarray(pixels).save(out / name)
    return [out / name for name in pictures]


def region_of(arguments: argparse.Namespace) -> str:
    """The region of the command line as a reference, empty without one."""
    for shape in ("point", "box", "scribble"):
        if getattr(arguments, shape) is not None:
            return f"{shape}:{getattr(arguments, shape)}"
    return os.path.abspath(arguments.region_mask) if arguments.region_mask else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run")
    parser.add_argument("--image", required=True)
    parser.add_argument("--question", required=True, help="may hold one <region>; without it a region goes to the end")
    parser.add_argument("--out", required=True, help="folder for the masks and the overlay")
    region = parser.add_mutually_exclusive_group()
    region.add_argument("--point", metavar="x,y", help="in pixels of the picture, as all regions")
    region.add_argument("--box", metavar="x0,y0,x1,y1")
    region.add_argument("--scribble", metavar='"x,y x,y ..."')
    region.add_argument("--region-mask", metavar="FILE", help="mask of the picture's size; the region is where it is not 0")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of sampling")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--mask-threshold", type=float)
    parser.add_argument("--quantize", choices=QUANTIZE[1:], default="", help="weights of 8 bits: half the memory of bfloat16")
    arguments = parser.parse_args()
    use_cache()
    try:
        sampling = Sampling(arguments.temperature, arguments.top_p)
        predictor = Predictor(
            arguments.checkpoint, max_new_tokens=arguments.max_new_tokens, mask_threshold=arguments.mask_threshold, sampling=sampling,
            quantize=arguments.quantize,
        )  # fmt: skip
        picture, prompt = predictor.prompt(arguments.image, arguments.question, region_of(arguments))
    except (ValueError, OSError) as error:  # what was given cannot be used; an error in answering is ours and keeps its traceback
        sys.exit(f"error: {error}")
    prediction = predictor.answer(picture, prompt, arguments.seed)
    print(prediction.answer)
    for path in write_prediction(prediction, arguments.out):
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
