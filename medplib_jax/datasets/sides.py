"""Where a text says that something lies in the picture, held against where its mask lies."""

import re

MARGIN = 0.02  # tolerance of a position, as share of the picture
SIDE = re.compile(
    r"\b(left|right|upper|lower|top|bottom)(?:[ -](left|right))?[ -]"
    r"(?:side|part|half|portion|corner|region|area|quadrant|third)?[ ]?"
    r"(?:of|in|on) (?:the|this) (?:\w+ )?(?:image|picture|scan|slice|photo|photograph)\b",
    re.IGNORECASE,
)


def contradiction(text: str, box: tuple[float, float, float, float]) -> str:
    """The words that put something elsewhere than its box; empty when there are none.

    The box: x0, y0, x1, y1 as shares of the picture. A box that reaches the place counts as there.
    """
    x0, y0, x1, y1 = box
    lies = {
        "left": x0 < 0.5 - MARGIN,
        "right": x1 > 0.5 + MARGIN,
        "upper": y0 < 0.5 - MARGIN,
        "top": y0 < 0.5 - MARGIN,
        "lower": y1 > 0.5 + MARGIN,
        "bottom": y1 > 0.5 + MARGIN,
    }
    for match in SIDE.finditer(text):
        if not all(lies[word.lower()] for word in match.groups() if word):
            return match[0]
    return ""
