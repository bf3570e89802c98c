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
from collections.abc import Mapping, Sequence

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
Turns = Sequence[tuple[str, str]]  # (human or gpt, text) of a conversation
_PLACEHOLDER = r"<region>(?:\s*</region>)?"


@dataclasses.dataclass(frozen=True)
class Prediction:
    """An answer with its masks.

    masks: bool [h, w] of the picture's size, one per <SEG> of the answer that has a mask slot. picture: RGB uint8
    [h, w, 3]. boxes: those in the answer's text, None for a model that draws masks instead. cut_off: it took all of
    `max_new_tokens`, and may lack its end.
    """

    answer: str
    masks: tuple[np.ndarray, ...]
    predicted_iou: tuple[float, ...]
    picture: np.ndarray
    boxes: tuple[Box, ...] | None = None
    cut_off: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a picture (RGB uint8 [h, w, 3]), read and checked.

    `regions`: how many it has; `notices`: what is unusual about its files.
    """

    picture: np.ndarray
    record: Record
    regions: int = 0
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
        """The checkpoint's parameters, in the layout for decoding."""
        return self.generator.params

    def __call__(
        self,
        image: Picture,
        question: str = "",
        region: Region | Mapping[str, Region] = "",
        seed: int = 0,
        examples: Sequence[tuple[Picture, Region]] = (),
    ) -> Prediction:
        """The answer to a question about an image; see `read_question`. seed: of sampling."""
        picture, prompt = self.prompt(read_question(image, question, region, examples))
        return self.answer(picture, prompt, seed)

    def prompt(self, asked: Question) -> tuple[np.ndarray, Batch]:
        """The picture (RGB uint8 [h, w, 3]) and the model's input, a batch of one."""
        asked = asked if self.draws_masks else with_boxes(asked)
        loader = self.loader([asked.record], asked.regions, self.pictures_of(asked))
        arrays, _ = loader.load_eval([0], [0], question=True)
        return asked.picture, Batch(**arrays)

    def pictures_of(self, asked: Question) -> int:
        """How many pictures the model sees of a question and its examples."""
        return 1 + len(asked.record.examples or ()) * self._model.icl.pictures

    def loader(self, records: Sequence[Record], regions: int = 0, pictures: int = 1) -> Loader:
        """Reads questions about pictures, each once.

        A question may be as long as the model's positions allow: lengths beyond training's go on in doubles.
        """
        slots = {"max_images": pictures, "max_regions": regions, "max_masks": 0}
        lengths = list(self._data.bucket_lengths)
        longest = self._model.llm.max_positions - self._eval.max_new_tokens
        while lengths[-1] < longest:
            lengths.append(min(2 * lengths[-1], longest))
        slots["bucket_lengths"] = tuple(lengths)
        data = dataclasses.replace(self._data, mask_canvas=LARGEST_SIDE, cache="", **slots)
        return Loader([records], self._tokenizer, data, self._model, cache_bytes=0)

    def answer(self, picture: np.ndarray, prompt: Batch, seed: int = 0) -> Prediction:
        """The answer to a prompt made from this picture."""
        generation = jax.device_get(self.generator(prompt, seed))
        text, masks, predicted_iou = self.read(picture.shape[:2], prompt, generation)
        found = None if self.draws_masks else tuple(boxes.read(text))
        return Prediction(text, masks, predicted_iou, picture, found, bool(generation.cut_off[0]))

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
    image: Picture,
    question: str,
    region: Region | Mapping[str, Region] = "",
    examples: Sequence[tuple[Picture, Region]] = (),
    *,
    earlier: Turns = (),
    normalized: bool = False,
) -> Question:
    """A question about an image: a file, a PIL image, or an array uint8 [h, w] (grey) or [h, w, 3] (RGB).

    region: "point:x,y", "box:x0,y0,x1,y1", "polygon:x,y ...", "scribble:x,y ..." in pixels, the path of a mask file, or
    a mask [h, w] whose region is where it is not 0; empty for none; several by their names (see `place_regions`).
    examples: up to three pictures, each with the mask of what is sought, which are shown before the question; an empty
    question then asks for the same in the image. earlier: the conversation before the question. normalized: coordinates
    are shares of the picture's width and height.

    Raises DataError for a picture, region or example that cannot be used. Raises ValueError for an array of another
    kind, for a question that is empty or not Unicode, for too many examples, and when regions and their places do not
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
    given = region if isinstance(region, Mapping) else {"": region}
    references = {
        name: _read_region(name, one, picture.shape[:2], normalized, contents, notices)
        for name, one in given.items()
        if not (isinstance(one, str) and not one)
    }
    shown = tuple(_read_example(number, *example, contents, notices) for number, example in enumerate(examples, 1))
    turns = [*earlier, ("human", place_regions(question, references))]
    if not any("<image>" in text for _, text in turns):
        begin = f"{EXAMPLES}Query: <image>\n" if shown else "<image>\n"
        turns[0] = (turns[0][0], f"{begin}{turns[0][1]}")
    record = Record("question", 0, "", (blob.name,), tuple(turns), contents=contents, examples=shown or None)
    in_all = sum(len(REGION.findall(text)) for _, text in turns)
    return Question(picture, record, in_all, tuple(notices))


def _read_region(
    name: str,
    region: Region,
    size: tuple[int, int],
    normalized: bool,
    contents: dict[str, bytes],
    notices: list[Notice],
) -> str:
    """What stands for a region in the text; a mask is put into `contents`. DataError when it cannot be used."""
    if isinstance(region, str) and regions.is_shape(region):
        reference = regions.scale(region, size) if normalized else region
        regions.draw(reference, size)  # raises what is wrong with it
        return reference
    marked = _encode_mask(region, f"region {name}".strip())
    if not load_mask(marked, size, notices).any():
        raise DataError(marked.name, None, "region is empty", "a pixel that is not 0", "none")
    contents[marked.name] = marked.content
    return marked.name


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
    """The question for a model whose regions are boxes in the text. DataError for a region that is no box or point."""
    height, width = asked.picture.shape[:2]
    try:
        turns = tuple(
            (role, REGION.sub(lambda found: boxes.region_text(found.group(1), width, height), text))
            for role, text in asked.record.turns
        )
    except ValueError as error:
        raise DataError(asked.record.images[0], None, str(error)) from error
    return dataclasses.replace(asked, record=dataclasses.replace(asked.record, turns=turns), regions=0)


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


def place_regions(question: str, references: Mapping[str, str]) -> str:
    """The question with each region in its place: `{NAME}` for the one of this name, `<region>` for the others in their
    order. Without any `<region>` these stand behind the question.

    ValueError for a place without a region or a region without a place.
    """
    named = [name for name in references if name and f"{{{name}}}" in question]
    others = [reference for name, reference in references.items() if name not in named]
    places = len(re.findall(_PLACEHOLDER, question))
    if places not in (0, len(others)):
        expected = {0: "none, as no region is given", 1: "at most 1"}.get(len(others), f"none or {len(others)}")
        raise ValueError(f"question {question!r} has {places} <region>, expected {expected}")
    waiting = iter(others)

    def put(place: re.Match) -> str:
        reference = next(waiting) if place[0].startswith("<") else references[place[0][1:-1]]
        return f"<region>{reference}</region>"

    pattern = "|".join([_PLACEHOLDER, *(re.escape(f"{{{name}}}") for name in named)])
    text = re.sub(pattern, put, question)
    return " ".join([text, *(f"<region>{reference}</region>" for reference in waiting)])
