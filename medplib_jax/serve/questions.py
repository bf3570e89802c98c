"""From a chat request to the model's input. Whatever a client writes is text: it can name no file of this machine."""

import dataclasses
import hashlib
import re
from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data import boxes
from medplib_jax.data.cache import MemoryCache
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.serve.feature_cache import content_key
from medplib_jax.serve.pictures import check_picture, read_data_url, read_mask
from medplib_jax.serve.refusals import Refused, told

LARGEST_SIDE = 2**13  # of a picture whose masks have its own size
MAX_TEXT = 20_000  # characters of a conversation
PREPARED_BYTES, SIZES_BYTES = 2**28, 2**20  # of pictures as the model reads them, and of pictures' sizes
_PLACE = re.compile(r"<region>(?:[^<]*</region>)?")
_TAGS = re.compile(r"</?(?:mask|image|img|im_start|im_end)>")


class Region(BaseModel):
    """A region of the last picture.

    `points` are x0, y0, x1, y1, ... in its pixels; a mask comes as run lengths instead.
    """

    model_config = ConfigDict(extra="forbid")

    type: Literal["point", "box", "polygon", "scribble", "mask"]
    points: list[float] = Field(default_factory=list, max_length=4096)
    rle: dict | None = None


class ImageUrl(BaseModel):
    url: str
    detail: str | None = None


class Part(BaseModel):
    """A piece of a message: text, or a picture."""

    type: Literal["text", "image_url", "input_text"]
    text: str = ""
    image_url: ImageUrl | str | None = None


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The model's input for one question.

    `size`: (height, width) of the last picture, None without one; `tokens`: positions it takes; `head`: those up to the
    last picture's end whose keys and values can be kept; 0 when they depend on more than tokens and pictures;
    `pictures`: the same for the same pictures, and for no others.
    """

    batch: Batch  # one row, numpy
    size: tuple[int, int] | None
    tokens: int
    head: int
    pictures: bytes


class PromptMaker:
    """Makes prompts for one model. All have the same shapes but for their length, which is one of `lengths`."""

    def __init__(
        self,
        data: DataConfig,
        model: ModelConfig,
        tokenizer: Tokenizer,
        lengths: Sequence[int],
        max_images: int,
        max_regions: int,
    ):
        self._data = dataclasses.replace(
            data,
            bucket_lengths=tuple(lengths),
            max_images=max_images,
            max_regions=max_regions,
            max_masks=0,
            mask_canvas=LARGEST_SIDE,
            cache="",
            on_error="raise",
            pack=False,
        )
        self._model = model
        # one for contents that are named by their digest, one for those that are not and may not be kept
        self._kept = Loader([], tokenizer, self._data, model, PREPARED_BYTES)
        self._unkept = Loader([], tokenizer, self._data, model, cache_bytes=0)
        self._sizes = MemoryCache(SIZES_BYTES)

    def __call__(self, messages: Sequence[Message], regions: Sequence[Region]) -> Prompt:
        """The prompt of a conversation that ends with a question.

        Refused: what cannot be asked, with the field that is at fault.
        """
        turns, pictures = _read_messages(messages)
        names = tuple(_name(content) for content, _ in pictures)
        sizes = [self._size(name, *picture) for name, picture in zip(names, pictures, strict=True)]
        size = sizes[-1] if sizes else None
        contents = {name: content for name, (content, _) in zip(names, pictures, strict=True)}
        if regions and size is None:
            raise Refused(400, "a region needs a picture", "regions")
        if self._model.draws_masks:
            references = [_reference(number, region, contents) for number, region in enumerate(regions)]
        else:
            references = [_box_text(number, region, *size) for number, region in enumerate(regions)]
        turns[-1] = ("human", _place(turns[-1][1], references))
        record = Record("request", 0, "request", names, tuple(turns), contents=contents)
        try:
            return self._prompt(self._kept.over([[record]]), size, "".join(names).encode())
        except DataError as error:
            raise Refused(400, told(error), "messages") from error

    def of_record(self, record: Record, size: tuple[int, int] | None) -> Prompt:
        """The prompt of a record whose last picture has this size. DataError for what cannot be used."""
        return self._prompt(self._unkept.over([[record]]), size, None)

    def _size(self, name: str, content: bytes, parameter: str) -> tuple[int, int]:
        """(height, width) of a picture, which is checked when it is seen for the first time."""
        found = self._sizes.get(name, lambda: {"size": np.array(check_picture(content, parameter))})
        height, width = found["size"].tolist()
        return height, width

    def _prompt(self, loader: Loader, size: tuple[int, int] | None, pictures: bytes | None) -> Prompt:
        """`pictures` None: they are known by their pixels."""
        arrays, _ = loader.load_eval([0], [0], question=True)
        of_pictures = arrays["clip_pixels"].shape[1] * self._model.image_tokens
        feature = arrays["feature_index"][0]
        seen = np.flatnonzero((feature >= 0) & (feature < of_pictures))
        scaled = bool(self._model.llm.trained_length)  # then rotary positions depend on the whole prompt
        head = int(seen[-1]) + 1 if len(seen) and not scaled else 0
        if (feature[:head] >= of_pictures).any():  # a region between pictures: its tokens are the same wherever it lies
            head = 0
        pictures = pictures or content_key(*(arrays[name] for name in ("clip_pixels", "sam_pixels", "sam_box")))
        return Prompt(Batch(**arrays), size, int(np.sum(arrays["valid"])), head, pictures)


def _name(content: bytes) -> str:
    """What a client's file is called here: its digest, so that what was made of it can be kept."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _read_messages(messages: Sequence[Message]) -> tuple[list[tuple[str, str]], list[tuple[bytes, str]]]:
    """Turns (role, text), and the pictures in their order with the message of each.

    System messages stand before the first question.
    """
    turns: list[tuple[str, str]] = []
    pictures: list[tuple[bytes, str]] = []
    system = []
    for number, message in enumerate(messages):
        text, shown = _read_parts(message, f"messages[{number}]")
        if message.role in ("system", "developer"):
            system.append(text)
            continue
        role = "gpt" if message.role == "assistant" else "human"
        if shown and role == "gpt":
            raise Refused(400, "pictures stand in the user's messages only", f"messages[{number}]")
        pictures += [(content, f"messages[{number}]") for content in shown]
        text = "".join("<image>\n" for _ in shown) + text
        if turns and turns[-1][0] == role:
            turns[-1] = (role, f"{turns[-1][1]}\n{text}")
        else:
            turns.append((role, text))
    if not turns or turns[0][0] != "human" or turns[-1][0] != "human":
        raise Refused(400, "a conversation begins and ends with a message of the user", "messages")
    if sum(len(text) for _, text in turns) + sum(map(len, system)) > MAX_TEXT:
        raise Refused(413, f"the conversation has more than {MAX_TEXT} characters", "messages")
    if system:
        turns[0] = ("human", "\n".join([*system, turns[0][1]]))
    return turns, pictures


def _read_parts(message: Message, parameter: str) -> tuple[str, list[bytes]]:
    """A message's text, without the tags that mean something to the model, and its pictures."""
    parts = [Part(type="text", text=message.content)] if isinstance(message.content, str) else message.content or []
    pictures = []
    for part in parts:
        if part.type == "image_url":
            if part.image_url is None:
                raise Refused(400, "expected an image_url", parameter)
            url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
            pictures.append(read_data_url(url, parameter))
    text = _TAGS.sub("", "\n".join(part.text for part in parts if part.text))
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refused(400, "the text is not Unicode (half of a surrogate pair)", parameter)
    if not text.strip() and not pictures:
        raise Refused(400, "the message is empty", parameter)
    return text, pictures


def _reference(number: int, region: Region, contents: dict[str, bytes]) -> str:
    """What stands for a region in the text: its coordinates, or the name of its mask in `contents`."""
    if region.type == "mask":
        parameter = f"regions[{number}]"
        if region.rle is None:
            raise Refused(400, "a mask needs its run lengths in `rle`", parameter)
        content = read_mask(region.rle, parameter)
        contents[_name(content)] = content
        return f"<region>{_name(content)}</region>"
    return f"<region>{region.type}:" + " ".join(f"{x:.3f},{y:.3f}" for x, y in _pairs(number, region)) + "</region>"


def _box_text(number: int, region: Region, height: int, width: int) -> str:
    """What stands for a region in the text of a model that refers with boxes."""
    try:
        numbers = ",".join(f"{x:.3f},{y:.3f}" for x, y in _pairs(number, region))
        return boxes.region_text(f"{region.type}:{numbers}", width, height)
    except ValueError as error:
        raise Refused(400, str(error), f"regions[{number}]") from error


def _pairs(number: int, region: Region) -> list[tuple[float, float]]:
    if len(region.points) % 2 or not np.isfinite(region.points).all():
        found = f"{len(region.points)} numbers"
        raise Refused(400, f"expected pairs of finite numbers, found {found}", f"regions[{number}]")
    return list(zip(region.points[::2], region.points[1::2], strict=True))


def _place(text: str, references: Sequence[str]) -> str:
    """The text with the regions at its `<region>`, or behind it where it has none."""
    places = len(_PLACE.findall(text))
    if places not in (0, len(references)):
        raise Refused(400, f"the question has {places} <region> for {len(references)} regions", "regions")
    if not places:
        return " ".join([text, *references])
    waiting = iter(references)
    return _PLACE.sub(lambda _: next(waiting), text)
