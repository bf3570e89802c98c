"""The audit as one self-contained HTML page: figures, bars, small pictures with masks, and every finding by name."""

import base64
import collections
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from scipy import ndimage

from medplib_jax.data import images, regions
from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.audit.facts import MaskFacts, RecordFacts

THUMBNAIL = 200  # pixels of the longest side
PER_FINDING, PER_GROUP, MOST_GROUPS = 6, 1, 48  # cards
LISTED = 200  # findings of a kind that are listed; the JSON has all
COLOURS = {False: (0, 229, 255), True: (255, 176, 0)}  # masks of answers, regions of questions


@dataclasses.dataclass(frozen=True)
class Card:
    """One record on the page; `picture` is a data URI, empty when there is none."""

    title: str
    chips: tuple[str, ...]
    picture: str
    turns: tuple[tuple[str, str], ...]
    detail: str


def write_page(report: dict[str, Any], facts: Sequence[RecordFacts], folder: str, path: str) -> None:
    """Writes the page of a report and the facts it was made from.

    What comes from the dataset is escaped; nothing is fetched.
    """
    by_name = {(one.source, one.record): one for one in facts}
    pictures, unit = Pictures(folder), report["lengths"]["unit"]
    groups = collections.defaultdict(list)
    for finding in report["findings"]:
        groups[finding["kind"]].append(finding)
    findings = {
        kind: {
            "count": len(found),
            "cards": [
                card_of(by_name[one["source"], one["record"]], pictures, unit, one["detail"], one["mask"])
                for one in spread(found, PER_FINDING)
            ],
            "rows": found[:LISTED],
        }
        for kind, found in ((kind, groups[kind]) for kind in report["finding_counts"])
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=Path(folder).resolve().name,
        report=report,
        findings=findings,
        gallery=[card_of(one, pictures, unit) for one in gallery(facts)],
        areas=area_labels(report["mask_areas"]),
        listed=LISTED,
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(page, encoding="utf-8")


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items, evenly over the whole."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(count, len(items))).astype(int))]


def gallery(facts: Sequence[RecordFacts]) -> list[RecordFacts]:
    """One record for each modality and task, each with another picture where there is one."""
    groups, seen = collections.defaultdict(list), set()
    for one in facts:
        if one.problem is None and one.images:
            groups[one.modality, one.task].append(one)
    chosen = []
    for key in sorted(groups):
        for one in sorted(groups[key], key=lambda one: one.picture_hash in seen)[:PER_GROUP]:
            seen.add(one.picture_hash)
            chosen.append(one)
    return chosen[:MOST_GROUPS]


def card_of(one: RecordFacts, pictures: "Pictures", unit: str, detail: str = "", mask: str = "") -> Card:
    chips = tuple(
        filter(
            None,
            (
                one.modality,
                one.task,
                "held out" if one.held_out else "training",
                f"{one.length} {unit}" if one.length else "",
            ),
        )
    )
    questions = [("Q", text) for text in one.questions]
    answers = [("A", text) for text in one.answers]
    turns = tuple(turn for pair in zip(questions, answers, strict=False) for turn in pair)
    masks = [each for each in one.masks if not mask or each.name == mask]
    return Card(f"{one.source}, record {one.record}", chips, pictures.draw(one, masks), turns, detail)


class Pictures:
    """Small pictures of records, with outlines of their masks."""

    def __init__(self, folder: str):
        self._folder, self._sources = folder, {}

    def draw(self, one: RecordFacts, masks: Iterable[MaskFacts]) -> str:
        """Data URI of a JPEG, empty when the record has no picture that can be read."""
        if one.source not in self._sources:
            self._sources[one.source] = open_source(str(Path(self._folder, one.source)), self._folder)
        try:
            record = self._sources[one.source][one.record]
            rgb = images.load_image(record.find(record.images[-1]))
        except (DataError, IndexError):
            return ""
        for mask in masks:
            rgb = outline(rgb, _load(record, mask.name, rgb.shape[:2]), COLOURS[mask.in_question])
        picture = Image.fromarray(rgb)
        picture.thumbnail((THUMBNAIL * 2, THUMBNAIL * 2))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=80)
        return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _load(record: Record, name: str, size: tuple[int, int]) -> np.ndarray:
    return regions.draw(name, size) if regions.is_shape(name) else images.load_mask(record.find(name), size)


def outline(rgb: np.ndarray, mask: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """The picture [h, w, 3] with the mask tinted and its edge drawn, as thick as stays visible in a small picture."""
    width = max(1, max(mask.shape) // 150)
    edge = ndimage.binary_dilation(mask, iterations=width) & (mask == 0)
    drawn = np.where(mask[..., None] > 0, (0.75 * rgb + 0.25 * np.array(colour)).astype(np.uint8), rgb)
    drawn[edge] = colour
    return drawn


def area_labels(areas: dict[str, Any]) -> dict[str, int]:
    """The histogram of mask areas with names for its bars."""
    edges = [f"{edge * 100:g} %" for edge in areas["edges"]]
    return {f"{low} to {high}": count for low, high, count in zip(edges, edges[1:], areas["counts"], strict=False)}
