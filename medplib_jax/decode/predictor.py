"""A checkpoint ready to answer questions about single pictures.

from medplib_jax.decode.predictor import Predictor

predictor = Predictor("runs/demo/stage_IV")  # or WORKDIR/checkpoints/STEP
found = predictor("scan.png", "Please segment the liver.")
print(found.answer)  # text, with <SEG> for each mask
for mask, iou in zip(found.masks, found.predicted_iou, strict=True):
    print(mask.shape, mask.mean(), iou)  # bool [h, w] of the picture's size
found = predictor("scan.png", "What is <region>?", region="box:40,60,90,120")
print(found.answer)
"""

import dataclasses
import io
import os
import re
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image

from medplib_jax.batch import Batch, Params
from medplib_jax.checkpoint import find_step, step_digest
from medplib_jax.data import boxes, regions
from medplib_jax.data.boxes import Box
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.icl_form import EXAMPLES, MAX_EXAMPLES, REQUEST
from medplib_jax.data.images import Blob, load_image, load_mask
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import REGION, Record
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.decode.masks import PictureMasks
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.sampling import GREEDY, Sampling
from medplib_jax.decode.slots import Generation

Picture = str | os.PathLike | Image.Image | np.ndarray
Region = str | os.PathLike | np.ndarray
LARGEST_SIDE = 2**15  # of a picture
_PLACEHOLDER = re.compile(r"<region>(?:\s*</region>)?")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer with its masks.

    masks: bool [h, w] of the picture's size, one per <SEG> of the answer that has a mask slot. picture: RGB uint8
    [h, w, 3]. boxes: those in the answer's text, None for a model that draws masks instead.
    """

    answer: str
    masks: tuple[np.ndarray, ...]
    predicted_iou: tuple[float, ...]
    picture: np.ndarray
    boxes: tuple[Box, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a picture (RGB uint8 [h, w, 3]), read and checked.

    `notices`: what is unusual about its files.
    """

    picture: np.ndarray
    record: Record
    has_region: bool = False
    notices: tuple[Notice, ...] = ()


class Predictor:
    """A checkpoint ready to answer; `identity` is what its answers depend on.

    Compiles anew for each prompt bucket. `quantize`: "int8" for weights of 8 bits.

    What is None comes from the experiment's `eval`. Answers hold at most `data.max_masks` masks, but never fewer than
    one.
    """

    def __init__(
        self,
        checkpoint_dir: str | os.PathLike,
        *,
        max_new_tokens: int | None = None,
        mask_threshold: float | None = None,
        sampling: Sampling = GREEDY,
        quantize: str = "",
    ):
        workdir, step = find_step(checkpoint_dir)
        loaded = load_checkpoint(workdir, step, quantize=quantize)
        experiment = loaded.experiment
        self.identity = [step_digest(workdir, step), max_new_tokens, mask_threshold, str(sampling), quantize]
        given = {"max_new_tokens": max_new_tokens, "mask_threshold": mask_threshold}
        self._eval = dataclasses.replace(
            experiment.eval, **{name: value for name, value in given.items() if value is not None}
        )
        self._data, self._model = dataclasses.replace(experiment.data, on_error="raise"), experiment.model
        self._draw = PictureMasks(self._model.mask, self._eval.mask_threshold)
        self._tokenizer = load_tokenizer(loaded.tokenizer)
        self.generator = Generator(
            self._model,
            loaded.params,
            DecodeOptions(
                max_new_tokens=self._eval.max_new_tokens,
                max_masks=max(1, self._data.max_masks) if self._model.draws_masks else 0,
                sampling=sampling,
                quantize=loaded.quantize,
            ),
            stop_ids=self._tokenizer.stop_ids,
            seg_id=self._tokenizer.seg_id,
        )

    @property
    def draws_masks(self) -> bool:
        """Whether its answers hold masks; else they hold boxes."""
        return self._model.draws_masks

    @property
    def slots(self) -> int:
        """Answers in the making at once."""
        return self._eval.batch_size

    @property
    def params(self) -> Params:
        """The checkpoint's parameters, laid out for decoding."""
        return self.generator.params

    def __call__(
        self,
        image: Picture,
        question: str = "",
        region: Region = "",
        seed: int = 0,
        examples: Sequence[tuple[Picture, Region]] = (),
    ) -> Prediction:
        """The answer to a question about an image; see `read_question`. seed: of sampling."""
        picture, prompt = self.prompt(image, question, region, examples)
        return self.answer(picture, prompt, seed)

    def prompt(
        self, image: Picture, question: str, region: Region = "", examples: Sequence[tuple[Picture, Region]] = ()
    ) -> tuple[np.ndarray, Batch]:
        """The picture (RGB uint8 [h, w, 3]) and the model's input, a batch of one; see `read_question`."""
        asked = read_question(image, question, region, examples)
        asked = asked if self._model.draws_masks else with_boxes(asked)
        pictures = 1 + len(asked.record.examples or ()) * self._model.icl.pictures
        loader = self.loader([asked.record], int(asked.has_region), pictures)
        arrays, _ = loader.load_eval([0], [0], question=True)
        return asked.picture, Batch(**arrays)

    def loader(self, records: Sequence[Record], regions: int = 0, pictures: int = 1) -> Loader:
        """Reads questions about pictures, each once."""
        slots = {"max_images": pictures, "max_regions": regions, "max_masks": 0}
        data = dataclasses.replace(self._data, mask_canvas=LARGEST_SIDE, cache="", **slots)
        return Loader([records], self._tokenizer, data, self._model, cache_bytes=0)

    def answer(self, picture: np.ndarray, prompt: Batch, seed: int = 0) -> Prediction:
        """The answer to a prompt made from this picture."""
        generation = jax.device_get(self.generator(prompt, seed))
        text, masks, predicted_iou = self.read(picture.shape[:2], prompt, generation)
        found = None if self._model.draws_masks else tuple(boxes.read(text))
        return Prediction(text, masks, predicted_iou, picture, found)

    def read(
        self, size: tuple[int, int], prompt: Batch, generation: Generation
    ) -> tuple[str, tuple[np.ndarray, ...], tuple[float, ...]]:
        """Text, masks (bool [h, w]) and their predicted IoU of one answer about a picture of this size (h, w)."""
        drawn = generation.mask_valid[0]
        masks = ()
        if drawn.any():
            masks = tuple(self._draw(generation.mask_logits[0, drawn], prompt.sam_box, size))
        text = self._tokenizer.decode(generation.tokens[0, : generation.lengths[0]]).strip()
        predicted_iou = () if generation.predicted_iou is None else tuple(generation.predicted_iou[0, drawn].tolist())
        return text, masks, predicted_iou


def read_question(
    image: Picture, question: str, region: Region = "", examples: Sequence[tuple[Picture, Region]] = ()
) -> Question:
    """A question about an image: a file, a PIL image, or an array uint8 [h, w] (grey) or [h, w, 3] (RGB).

    region: "point:x,y", "box:x0,y0,x1,y1", "polygon:x,y ...", "scribble:x,y ..." in pixels, the path of a mask file, or
    a mask [h, w] whose region is where it is not 0; empty for none. examples: up to three pictures, each with the mask
    of what is sought, which are shown before the question; an empty question then asks for the same in the image.

    Raises DataError for a picture, region or example that cannot be used. Raises ValueError for an array of another
    kind, for a question that is empty or not Unicode, for too many examples, and when region and `<region>` do not
    match.
    """
    if len(examples) > MAX_EXAMPLES:
        raise ValueError(f"{len(examples)} examples: expected at most {MAX_EXAMPLES}")
    question = question if question.strip() or not examples else REQUEST
    if not question.strip() or not _is_unicode(question):
        raise ValueError(f"question {question!a}: expected some text in UTF-8")
    notices: list[Notice] = []
    blob = _encode(image, "picture")
    picture = load_image(blob, notices)
    contents = {blob.name: blob.content}
    if isinstance(region, str) and (not region or regions.is_shape(region)):
        reference = region
        if region:
            regions.draw(region, picture.shape[:2])  # raises what is wrong with it
    else:
        marked = _encode_mask(region)
        reference, contents[marked.name] = marked.name, marked.content
        if not load_mask(marked, picture.shape[:2], notices).any():
            raise DataError(reference, None, "region is empty", "a pixel that is not 0", "none")
    text = place_region(question, reference)
    shown = tuple(_read_example(number, *example, contents, notices) for number, example in enumerate(examples, 1))
    if "<image>" not in text:
        text = f"{EXAMPLES}Query: <image>\n{text}" if shown else f"<image>\n{text}"
    record = Record("question", 0, "", (blob.name,), (("human", text),), contents=contents, examples=shown or None)
    return Question(picture, record, bool(reference), tuple(notices))


def _read_example(
    number: int, image: Picture, mask: Region, contents: dict[str, bytes], notices: list[Notice]
) -> tuple[str, str]:
    """Puts an example into `contents`, and returns its names there. DataError when its mask cannot be used."""
    picture, marked = _encode(image, f"example {number}"), _encode_mask(mask, f"mask of example {number}")
    if not load_mask(marked, load_image(picture, notices).shape[:2], notices).any():
        raise DataError(marked.name, None, "mask of an example is empty", "a pixel that is not 0", "none")
    contents |= {picture.name: picture.content, marked.name: marked.content}
    return picture.name, marked.name


def with_boxes(asked: Question) -> Question:
    """The question for a model whose regions are boxes in the text. ValueError for a region that is no box or point."""
    height, width = asked.picture.shape[:2]
    turns = tuple(
        (role, REGION.sub(lambda found: boxes.region_text(found.group(1), width, height), text))
        for role, text in asked.record.turns
    )
    return dataclasses.replace(asked, record=dataclasses.replace(asked.record, turns=turns), has_region=False)


def _is_unicode(text: str) -> bool:
    """False for what a command line holds that is not UTF-8: Python keeps such bytes as halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _encode(image: Picture, name: str) -> Blob:
    """The image as an encoded file; one that is no file is called `name`."""
    if isinstance(image, str | os.PathLike):
        path = os.path.abspath(image)
        try:
            with open(path, "rb") as file:
                return Blob(path, file.read())
        except OSError as error:
            what = "file is missing" if isinstance(error, FileNotFoundError) else "file cannot be read"
            raise DataError(path, None, what, "an image file", error.strerror or str(error)) from error
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
            raise ValueError(f"{name}: expected uint8 [h, w] or [h, w, 3], found {image.dtype} {list(image.shape)}")
        image = Image.fromarray(image)
    content = io.BytesIO()
    image.save(content, "png")
    return Blob(name, content.getvalue())


def _encode_mask(mask: Region, name: str = "region") -> Blob:
    is_file = isinstance(mask, str | os.PathLike)
    return _encode(mask if is_file else np.where(np.asarray(mask) != 0, 255, 0).astype(np.uint8), name)


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
