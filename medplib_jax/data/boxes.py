"""Boxes in text, as Qwen-VL writes them: `<ref>phrase</ref><box>(x1,y1),(x2,y2)</box>`, whole numbers 0-999 on the
stretched picture.

The stretch keeps shares of width and height, so the numbers are thousandths of the original picture.
"""

import dataclasses
import re

GRID = 1000
_PIECE = re.compile(r"<(/?)(ref|box|quad)>")
_BOX = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")


@dataclasses.dataclass(frozen=True)
class Box:
    """One box of a text and the phrase that it belongs to (empty without one).

    `parse` gives x1 <= x2 and y1 <= y2 in [0, 1000).
    """

    x1: int
    y1: int
    x2: int
    y2: int
    label: str = ""

    def pixels(self, width: int, height: int) -> tuple[int, int, int, int]:
        """(x1, y1, x2, y2) on a picture of this size, cut down to whole pixels as the original draws them."""
        x1, y1, x2, y2 = (
            int(value / GRID * side) for value, side in zip(self.corners, (width, height) * 2, strict=True)
        )
        return x1, y1, x2, y2

    @property
    def corners(self) -> tuple[int, int, int, int]:
        return self.x1, self.y1, self.x2, self.y2

    def __str__(self) -> str:
        return f"<box>({self.x1},{self.y1}),({self.x2},{self.y2})</box>"


def from_pixels(box: tuple[float, float, float, float], width: int, height: int, label: str = "") -> Box:
    """The box of pixels (x1, y1, x2, y2). ValueError when it is not inside the picture or has no corner order."""
    x1, y1, x2, y2 = box
    if not (0 <= x1 <= x2 <= width and 0 <= y1 <= y2 <= height):
        raise ValueError(f"box {box}: expected 0 <= x1 <= x2 <= {width} and 0 <= y1 <= y2 <= {height}")
    shares = (value / side for value, side in zip(box, (width, height) * 2, strict=True))
    x1, y1, x2, y2 = (min(GRID - 1, int(GRID * share)) for share in shares)
    return Box(x1, y1, x2, y2, label)


def region_text(region: str, width: int, height: int) -> str:
    """A region of a picture, "box:x1,y1,x2,y2" or "point:x,y" in pixels, as Med-GRIT's questions name it:

    `<ref>this region</ref>` and its box, of a point one without size. ValueError for another kind or what lies outside.
    """
    kind, _, numbers = region.partition(":")
    try:
        values = tuple(float(number) for number in re.split(r"[\s,]+", numbers.strip()))
    except ValueError:
        values = ()
    if (kind, len(values)) not in (("box", 4), ("point", 2)):
        raise ValueError(f"region {region!r}: this model's questions take box:x1,y1,x2,y2 or point:x,y")
    x1, y1, x2, y2 = (*values, *values)[:4]
    return f"<ref>this region</ref>{from_pixels((x1, y1, x2, y2), width, height)}"


def parse(text: str) -> list[Box]:
    """Every box of a text, strictly:

    ValueError for a tag that is not closed or nested, a box that is not "(x1,y1),(x2,y2)", numbers outside 0-999, and
    corners in the wrong order. Boxes that follow a phrase directly, or one of its boxes, are that phrase's.
    """
    boxes, label, open_tag, place = [], "", "", 0
    for match in _PIECE.finditer(text):
        closing, tag = match.groups()
        inside = text[place : match.start()]
        if bool(closing) != bool(open_tag) or (closing and tag != open_tag):
            raise ValueError(f"{match.group()} at {match.start()} does not match its tags: {text!r}")
        if not closing:
            label = label if not inside and tag == "box" else ""
        elif tag == "ref":
            label = inside.strip()
        elif tag == "box":
            boxes.append(_box(inside, label))
        open_tag, place = ("" if closing else tag), match.end()
    if open_tag:
        raise ValueError(f"<{open_tag}> is not closed: {text!r}")
    return boxes


def _box(inside: str, label: str) -> Box:
    match = _BOX.fullmatch(inside)
    if match is None:
        raise ValueError(f"box {inside!r}: expected (x1,y1),(x2,y2) of whole numbers")
    x1, y1, x2, y2 = map(int, match.groups())
    if max(x1, y1, x2, y2) >= GRID:
        raise ValueError(f"box {inside!r}: expected numbers from 0 to {GRID - 1}")
    if x1 > x2 or y1 > y2:
        raise ValueError(f"box {inside!r}: expected x1 <= x2 and y1 <= y2")
    return Box(x1, y1, x2, y2, label)


def read(text: str) -> list[Box]:
    """The boxes of a model's answer as Qwen-VL reads them:

    Any four whole numbers between the tags, in whatever order and range. What is not that is left out: in an answer
    nothing is promised.
    """
    found = []
    for match in re.finditer(r"(?:<ref>((?:(?!<ref>).)*?)</ref>)?((?:<box>[^<>]*</box>)+)", text, re.DOTALL):
        for inside in re.findall(r"<box>([^<>]*)</box>", match[2]):
            numbers = re.sub(r"[()\s]", "", inside).split(",")
            if len(numbers) == 4 and all(number.isdecimal() for number in numbers):
                x1, y1, x2, y2 = map(int, numbers)
                found.append(Box(x1, y1, x2, y2, (match[1] or "").strip()))
    return found
