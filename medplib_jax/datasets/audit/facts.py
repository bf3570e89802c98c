"""What the audit knows of one record: its text, its pictures, where its masks lie, or why it cannot be used.

Everything is plain values.
"""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from medplib_jax.data import images, regions
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.records import MASK, REGION, Record, check_complete
from medplib_jax.datasets.mecovqa import class_name, parse_image_name
from medplib_jax.datasets.patients import patient_of

_TAG = re.compile(r"<[^<>]{1,12}>")


@dataclasses.dataclass(frozen=True)
class MaskFacts:
    """A mask of an answer or of a question. Positions are shares of the picture's width and height."""

    name: str
    label: str  # what it marks, as its file name or the collection says; empty when unknown
    in_question: bool
    turn: int
    area: float  # share of the picture
    x: float  # centre of mass
    y: float
    box: tuple[float, float, float, float]  # x0, y0, x1, y1
    hash: str  # of its pixels


@dataclasses.dataclass(frozen=True)
class RecordFacts:
    """One record. `problem` says why it cannot be used; what comes after it may then be missing."""

    source: str
    record: int
    held_out: bool
    problem: DataError | None = None
    images: tuple[str, ...] = ()
    modality: str = ""
    patient: str = ""  # patient, scan or video, as far as anything says
    task: str = ""  # grounding, region, open, closed, or vqa where the type of the answer is not stated
    answer_type: str = ""
    questions: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    length: int = 0
    picture_hash: str = ""
    masks: tuple[MaskFacts, ...] = ()
    notices: tuple[str, ...] = ()  # what is odd about its files
    examples: tuple[tuple[str, str], ...] = ()  # (image, mask) that are shown before its picture
    example_hashes: tuple[str, ...] = ()  # of their pictures

    @property
    def text(self) -> str:
        return " ".join(self.questions + self.answers)


@dataclasses.dataclass(frozen=True)
class _Picture:
    size: tuple[int, int]
    hash: str
    notices: tuple[Notice, ...]


class Reader:
    """Facts of the records of one source. Pictures are decoded once per name; only their size and hash are kept."""

    def __init__(
        self,
        source: Sequence[Record],
        name: str,
        held_out: bool,
        measure: Callable[[Record], int],
        class_names: dict,
        pattern: str,
    ):
        self._source, self._name, self._held_out = source, name, held_out
        self._measure, self._class_names, self._pattern = measure, class_names, pattern
        self._pictures: dict[str, _Picture] = {}

    def facts(self, index: int) -> RecordFacts:
        try:
            record = self._source[index]
            check_complete(record)
            patient = self._patient(record)
        except DataError as error:
            return RecordFacts(self._name, index, self._held_out, error)
        known = RecordFacts(
            self._name,
            index,
            self._held_out,
            None,
            record.images,
            record.modality,
            patient,
            task_of(record),
            record.answer_type,
            tuple(plain(text) for role, text in record.turns if role == "human"),
            tuple(plain(text) for role, text in record.turns if role == "gpt"),
            self._measure(record),
            examples=record.examples or (),
        )
        notices: list[Notice] = []
        try:
            pictures = [self._picture(record, name) for name in record.images]
            masks = tuple(self._masks(record, [picture.size for picture in pictures], notices))
            shown = [self._example(record, *example, notices) for example in record.examples or ()]
        except DataError as error:
            return dataclasses.replace(known, problem=error)
        odd = [*(notice for picture in pictures for notice in picture.notices), *notices]
        return dataclasses.replace(
            known,
            picture_hash="".join(picture.hash for picture in pictures),
            masks=masks,
            notices=tuple(f"{os.path.basename(one.file)}: {one.found}" for one in odd),
            example_hashes=tuple(picture.hash for picture in shown),
        )

    def _patient(self, record: Record) -> str:
        """Whose image it is, as the option, the record, or the image's name or folder says; empty when none does.

        A folder without a digit is a modality or a part of a dataset rather than a patient.
        """
        image = record.images[0].removeprefix("images/") if record.images else ""
        if self._pattern:
            return patient_of(image, self._pattern)
        folder = image.split("/")[0] if "/" in image else ""
        told = record.patient or parse_image_name(image).patient
        return told or (folder if any(map(str.isdigit, folder)) else "")

    def _picture(self, record: Record, name: str) -> "_Picture":
        if name not in self._pictures:
            notices: list[Notice] = []
            rgb = images.load_image(record.find(name), notices)
            self._pictures[name] = _Picture(
                rgb.shape[:2], hashlib.blake2b(rgb.tobytes(), digest_size=12).hexdigest(), tuple(notices)
            )
        return self._pictures[name]

    def _example(self, record: Record, image: str, mask: str, notices: list[Notice]) -> "_Picture":
        """The picture of an example. DataError when its mask cannot be used."""
        picture = self._picture(record, image)
        if not images.load_mask(record.find(mask), picture.size, notices).any():
            raise record.error("mask of an example is empty", "at least one pixel", mask)
        return picture

    def _masks(self, record: Record, sizes: Sequence[tuple[int, int]], notices: list[Notice]) -> Iterator[MaskFacts]:
        for turn, (role, text) in enumerate(record.turns):
            for name in (REGION if role == "human" else MASK).findall(text):
                if not sizes:
                    raise record.error("mask or region without an image", "an image", "none")
                if regions.is_shape(name):
                    mask, label = regions.draw(name, sizes[-1]), ""
                else:
                    mask, label = (
                        images.load_mask(record.find(name), sizes[-1], notices),
                        class_name(name, self._class_names),
                    )
                if not mask.any():
                    raise record.error("mask is empty", "at least one pixel", name)
                yield measure_mask(mask, name, label, role == "human", turn)


def measure_mask(mask: np.ndarray, name: str, label: str, in_question: bool, turn: int) -> MaskFacts:
    """Area and place of a 0/1 mask [h, w] that is not empty."""
    rows, columns = np.nonzero(mask)
    height, width = mask.shape
    box = (columns.min() / width, rows.min() / height, (columns.max() + 1) / width, (rows.max() + 1) / height)
    centre = ((columns.mean() + 0.5) / width, (rows.mean() + 0.5) / height)
    content = hashlib.blake2b(np.packbits(mask).tobytes(), digest_size=12).hexdigest()
    return MaskFacts(
        name, label, in_question, turn, len(rows) / mask.size, *map(float, centre), tuple(map(float, box)), content
    )


def plain(text: str) -> str:
    """The words of a turn without references and special tokens; ▢ stands for a region, ◼ for a mask."""
    return " ".join(_TAG.sub(" ", MASK.sub("", REGION.sub("▢", text)).replace("<SEG>", "◼")).split())


def task_of(record: Record) -> str:
    if any(MASK.search(text) for role, text in record.turns if role == "gpt"):
        return "grounding"
    if any(REGION.search(text) for _, text in record.turns):
        return "region"
    return record.answer_type if record.answer_type in ("open", "closed") else "vqa"
