"""Boxes as text, in Med-GRIT's form: `<box>(x1,y1),(x2,y2)</box>`, 0-999 on the image stretched to a square."""

CELLS = 1000
Box = tuple[int, int, int, int]  # x0, y0, x1, y1; of pixels: x1 and y1 lie outside


def to_grid(box: Box, size: tuple[int, int]) -> Box:
    """The grid box of a pixel box in a picture of that size (h, w). The last line is the picture's border.

    It is never empty: a thinner one is a cell wide."""
    x0, x1 = _interval(box[0], box[2], size[1])
    y0, y1 = _interval(box[1], box[3], size[0])
    return x0, y0, x1, y1


def _interval(start: int, stop: int, length: int) -> tuple[int, int]:
    first, last = (min(CELLS - 1, round(CELLS * value / length)) for value in (start, stop))
    return (first, last) if last > first else (min(first, CELLS - 2), min(first, CELLS - 2) + 1)


def box_text(box: Box) -> str:
    """Text of a grid box."""
    return "<box>({},{}),({},{})</box>".format(*box)
