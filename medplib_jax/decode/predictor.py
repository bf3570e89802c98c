"""A checkpoint ready to answer questions about single pictures."""

import dataclasses
import os
import re
from collections.abc import Sequence

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
from medplib_jax.decode.masks import MaskDrawer, mask_drawer
from medplib_jax.decode.sampling import Sampling
from medplib_jax.decode.slots import Generation

_PLACEHOLDER = re.compile(r"<region>(?:\s*</region>)?")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer with its masks.

    masks: bool [h, w] of the picture's size, one per <SEG> of the answer that has a mask slot. picture: RGB uint8
    [h, w, 3].
    """

    answer: str
    masks: tuple[np.ndarray, ...]
    predicted_iou: tuple[float, ...]
    picture: np.ndarray


class Predictor:
    """A checkpoint ready to answer; `identity` is what its answers depend on.

    Compiles anew for each prompt bucket and each picture size. `quantize`: "int8" for weights of 8 bits.

    What is None comes from the experiment's `eval`. Answers hold at most `data.max_masks` masks, but never fewer than
    one.
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
        saved = sorted(os.listdir(checkpoint_dir))
        self.identity = [
            os.path.abspath(checkpoint_dir),
            saved,
            max_new_tokens,
            mask_threshold,
            str(sampling),
            quantize,
        ]
        given = {"max_new_tokens": max_new_tokens, "mask_threshold": mask_threshold}
        self._eval = dataclasses.replace(
            experiment.eval, **{name: value for name, value in given.items() if value is not None}
        )
        self._data, self._model = dataclasses.replace(experiment.data, on_error="raise"), experiment.model
        self._tokenizer = Tokenizer.load(tokenizer_dir)
        self._drawers: dict[int, MaskDrawer] = {}
        self.generator = Generator(
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
    def slots(self) -> int:
        """Answers in the making at once."""
        return self._eval.batch_size

    @property
    def params(self) -> Params:
        """The checkpoint's parameters, laid out for decoding."""
        return self.generator.params

    def __call__(self, image: str | os.PathLike, question: str, region: str = "", seed: int = 0) -> Prediction:
        """The answer to a question; see `prompt`."""
        picture, prompt = self.prompt(image, question, region)
        return self.answer(picture, prompt, seed)

    def prompt(self, image: str | os.PathLike, question: str, region: str = "") -> tuple[np.ndarray, Batch]:
        """The picture (RGB uint8 [h, w, 3]) and the model's input.

        region: "point:x,y", "box:x0,y0,x1,y1", "polygon:x,y ...", "scribble:x,y ..." in pixels, or the path of a mask
        file; empty for none. Raises DataError for a picture, region or question that cannot be used, ValueError when
        region and `<region>` do not match.
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
        loader = self.loader([record], max(picture.shape[:2]), regions=int(bool(region)))
        arrays, _ = loader.load_eval([0], [0], question=True)
        return picture, Batch(**arrays)

    def loader(self, records: Sequence[Record], canvas: int, regions: int = 0) -> Loader:
        """Reads questions about pictures of up to `canvas` pixels a side, each once."""
        slots = {"max_images": 1, "max_regions": regions, "max_masks": 0}
        data = dataclasses.replace(self._data, mask_canvas=canvas, cache="", **slots)
        return Loader([records], self._tokenizer, data, self._model, cache_bytes=0)

    def answer(self, picture: np.ndarray, prompt: Batch, seed: int = 0) -> Prediction:
        """The answer to a prompt made from this picture."""
        generation = jax.device_get(self.generator(prompt, seed))
        return Prediction(*self.read(picture.shape[:2], prompt, generation), picture)

    def read(
        self, size: tuple[int, int], prompt: Batch, generation: Generation
    ) -> tuple[str, tuple[np.ndarray, ...], tuple[float, ...]]:
        """Text, masks (bool [h, w]) and their predicted IoU of one answer about a picture of this size (h, w)."""
        drawn = generation.mask_valid[0]
        masks = ()
        if drawn.any():
            masks = tuple(self._drawer(max(size))(prompt, generation)[0, drawn, : size[0], : size[1]])
        text = self._tokenizer.decode(generation.tokens[0, : generation.lengths[0]]).strip()
        return text, masks, tuple(generation.predicted_iou[0, drawn].tolist())

    def _drawer(self, canvas: int) -> MaskDrawer:
        """Compiled once for each canvas."""
        if canvas not in self._drawers:
            mask = self._model.mask
            self._drawers[canvas] = mask_drawer(mask.image_size, mask.unpad, canvas, self._eval.mask_threshold)
        return self._drawers[canvas]


def place_region(question: str, region: str) -> str:
    """The question with the region in place of its `<region>`, or behind it.

    ValueError for a place without a region or several places.
    """
    places = len(_PLACEHOLDER.findall(question))
    if places > 1 or places > bool(region):
        expected = "at most 1" if region else "none, as no region is given"
        raise ValueError(f"question {question!r} has {places} <region>, expected {expected}")
    reference = f"<region>{region}</region>"
    if places:
        return _PLACEHOLDER.sub(lambda _: reference, question)
    return f"{question} {reference}" if region else question
