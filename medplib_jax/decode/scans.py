"""A scan answered slice by slice: whether each structure is there, and its mask, by continuous batching."""

import argparse
import dataclasses
import functools
import io
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.batch import Batch
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record
from medplib_jax.decode.predictor import Predictor
from medplib_jax.decode.stream import lanes_for, stream_answers
from medplib_jax.parallel.compilation import compiling_shown
from medplib_jax.volumes.geometry import PLANES
from medplib_jax.volumes.pictures import Pictures, pictures
from medplib_jax.volumes.read import read_scan
from medplib_jax.volumes.results import SliceStore, write_results
from medplib_jax.volumes.shapes import interpolate, largest_component, smooth
from medplib_jax.volumes.volume import MAX_VOXELS
from medplib_jax.volumes.windows import WINDOW_HELP, parse_window

STRUCTURE = "{structure}"  # its place in a question
QUESTION = f"Please segment the {STRUCTURE}."
MODEL = "MedPLIB"


@dataclasses.dataclass(frozen=True)
class ScanOptions:
    """structures: asked for one by one with `question`. plane, window: as for `pictures`.

    slices: (first, end), None: all.

    every: asks about every N-th slice, masks between are interpolated. smooth: mm, 0 for no smoothing. index:
    which of several volumes.
    """

    structures: tuple[str, ...]
    question: str = QUESTION
    plane: str = "acquired"
    window: str = ""
    slices: tuple[int, int] | None = None
    every: int = 1
    largest_component: bool = False
    smooth: float = 0.0
    index: int | None = None
    seed: int = 0

    def __post_init__(self):
        if not self.structures or len(set(self.structures)) < len(self.structures):
            raise ValueError(f"--structures: expected different names, found {'; '.join(self.structures)!r}")
        if len(self.structures) > 1 and STRUCTURE not in self.question:
            raise ValueError(f"--question: expected {STRUCTURE} in it, found {self.question!r}")
        if self.every < 1 or self.smooth < 0:
            raise ValueError(f"--every and --smooth: expected at least 1 and 0, found {self.every} and {self.smooth}")
        if self.window:
            parse_window(self.window)


@dataclasses.dataclass(frozen=True)
class SliceAnswer:
    """What the model says of one structure on one slice.

    mask: bool [rows, columns] on the scan's voxels, None when the answer has none: the structure is not there.
    predicted_iou: of the mask's parts, their mean; 0 without a mask.
    """

    structure: str
    number: int
    answer: str
    mask: np.ndarray | None
    predicted_iou: float


class SliceRecords(Sequence):
    """One question about each of some slices, as records that are made when they are read."""

    def __init__(self, shown: Pictures, numbers: Sequence[int], question: str):
        self._shown, self._numbers, self._question = shown, numbers, question

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> Record:
        number, content = self._numbers[index], io.BytesIO()
        Image.fromarray(self._shown[number]).save(content, "png")
        name = f"slice_{number}.png"
        turns = (("human", f"<image>\n{self._question}"),)
        scan = self._shown.volume.name
        return Record(scan, number, scan, (name,), turns, contents={name: content.getvalue()})


def answer_slices(
    predictor: Predictor, shown: Pictures, structure: str, question: str, numbers: Sequence[int], seed: int = 0
) -> Iterator[SliceAnswer]:
    """The answers about these slices, as they end. Holds as many pictures as slots, however many slices there are."""
    if not numbers:
        return
    height, width = shown.cut.size
    text = question.replace(STRUCTURE, structure)
    loader = predictor.loader(SliceRecords(shown, numbers, text))
    prompts = (Batch(**loader.load_eval([index], [0], question=True)[0]) for index in range(len(numbers)))
    slots = min(predictor.slots, len(numbers))
    lanes = lanes_for(predictor.params, slots)
    refill = max(1, slots // 2)
    for prompt, generation in stream_answers(
        predictor.generator, prompts, slots=slots, refill=refill, lanes=lanes, seed=seed
    ):
        answer, masks, ious = predictor.read((height, width), prompt, generation)
        mask = shown.cut.mask_on_plane(np.logical_or.reduce(masks)) if masks else None
        iou = float(np.mean(ious)) if masks else 0.0
        yield SliceAnswer(structure, numbers[int(prompt.record[0])], answer, mask, iou)


@dataclasses.dataclass(frozen=True)
class ScanModel:
    """What answers slices: (pictures, structure, question, numbers of slices, seed) to answers as they end.

    identity: what its answers depend on.
    """

    identity: Sequence[Any]
    answer_slices: Callable[[Pictures, str, str, Sequence[int], int], Iterator[SliceAnswer]]


def scan_model(predictor: Predictor) -> ScanModel:
    return ScanModel(predictor.identity, functools.partial(answer_slices, predictor))


def answer_scan(
    model: ScanModel,
    path: str,
    out: str,
    options: ScanOptions,
    tell: Callable[[int, int], None] | None = None,
    most: int = MAX_VOXELS,
) -> list[str]:
    """Asks about a scan and writes what comes out to the folder `out`; returns the names of the files.

    Slices that an interrupted run of the same model, scan and options answered are not asked again. tell: is called
    with (slices answered, slices in all); None shows a bar. most: voxels that are allowed.

    DataError for a scan or slices that cannot be used.
    """
    scan = read_scan(path, options.index, most)
    for notice in scan.notices:
        print(f"note: {notice}", file=sys.stderr)
    shown = pictures(scan, options.plane, parse_window(options.window) if options.window else None)
    numbers = _numbers(shown, options)
    store = SliceStore(out, _made_of(model, scan.files, options))
    try:
        _answer_missing(model, shown, numbers, options, store, tell)
    finally:
        store.close()
    masks, ious = {}, {}
    for structure in options.structures:
        masks[structure] = _volume_mask(store, shown, structure, numbers, options)
        found = [store.answers[structure, n]["predicted_iou"] for n in numbers if store.answers[structure, n]["mask"]]
        ious[structure] = float(np.mean(found)) if found else 0.0
    return write_results(out, scan, shown, masks, ious, MODEL)


def _numbers(shown: Pictures, options: ScanOptions) -> list[int]:
    """The slices that are asked about: with `every` the last one, too, so that masks reach it."""
    first, end = options.slices or (0, len(shown))
    if not 0 <= first < end <= len(shown):
        found = f"{first}:{end}"
        raise DataError(shown.volume.file, None, "no such slices", f"A:B within 0:{len(shown)}", found)
    return sorted({*range(first, end, options.every), end - 1})


def _made_of(model: ScanModel, files: Sequence[str], options: ScanOptions) -> dict[str, Any]:
    """What answers depend on; what is done to the masks afterwards does not count, nor which slices are asked about."""
    asked = {name: getattr(options, name) for name in ("question", "plane", "window", "index", "seed")}
    states = [os.stat(file) for file in files]
    return asked | {"files": [[s.st_size, s.st_mtime_ns] for s in states], "model": model.identity}


def _answer_missing(
    model: ScanModel,
    shown: Pictures,
    numbers: Sequence[int],
    options: ScanOptions,
    store: SliceStore,
    tell: Callable[[int, int], None] | None,
) -> None:
    total = len(options.structures) * len(numbers)
    missing = {
        structure: [number for number in numbers if (structure, number) not in store.answers]
        for structure in options.structures
    }
    done = total - sum(map(len, missing.values()))
    with (
        tqdm(total=total, initial=done, desc="slices", unit="slice", disable=tell is not None) as bar,
        compiling_shown(bar),
    ):
        for structure, asked in missing.items():
            for one in model.answer_slices(shown, structure, options.question, asked, options.seed):
                store.add(one.structure, one.number, one.answer, one.mask, one.predicted_iou)
                bar.update()
                done += 1
                if tell:
                    tell(done, total)


def _volume_mask(
    store: SliceStore, shown: Pictures, structure: str, numbers: Sequence[int], options: ScanOptions
) -> np.ndarray:
    """A structure's mask on the scan's grid, after what the options ask for."""
    mask = np.zeros(shown.volume.shape, bool)
    planes = shown.cut.reoriented(mask)
    for number in numbers:
        if (plane := store.plane(structure, number)) is not None:
            planes[number] = plane
    interpolate(planes, numbers)
    mask = largest_component(mask) if options.largest_component else mask
    return smooth(mask, shown.volume.spacing, options.smooth) if options.smooth else mask


def add_scan_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of a command that answers scans; `scan_options` reads them."""
    scan = parser.add_argument_group("scans (DICOM, NIfTI, NRRD, MetaImage)")
    scan.add_argument("--structures", metavar="A;B;...", help="what to segment, one mask each")
    scan.add_argument("--plane", choices=PLANES, default=PLANES[0], help="slices that the model sees")
    scan.add_argument("--window", default="", help=WINDOW_HELP)
    scan.add_argument("--slices", metavar="A:B", help="from A up to B, without B; all of them by default")
    scan.add_argument("--every", type=int, default=1, help="ask about every N-th slice, interpolate between")
    scan.add_argument("--largest-component", action="store_true", help="keep the largest part of each mask")
    scan.add_argument("--smooth", type=float, default=0.0, metavar="MM", help="smooth the masks' surface")
    scan.add_argument("--index", type=int, help="which of several volumes of a file or folder")


def scan_options(arguments: argparse.Namespace) -> ScanOptions:
    """ValueError for flags that cannot be used."""
    names = tuple(filter(None, (name.strip() for name in (arguments.structures or "").split(";"))))
    if not names and (arguments.question or arguments.jobs):
        names = ("segmentation",)  # what a question asks for, of the command line or of a job
    match = re.fullmatch(r"(\d+):(\d+)", arguments.slices or "0:1")
    if not match:
        raise ValueError(f"--slices: expected A:B, found {arguments.slices!r}")
    slices = (int(match[1]), int(match[2])) if arguments.slices else None
    same: Mapping[str, Any] = {
        name: getattr(arguments, name)
        for name in ("plane", "window", "every", "largest_component", "smooth", "index", "seed")
    }
    return ScanOptions(names, arguments.question or QUESTION, slices=slices, **same)
