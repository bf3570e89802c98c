"""Med-GRIT-270k: JSON files of {"id", "conversations": [[question, answer], ...]}; images below the folder, as <img>...</img> names them.

Phrases and boxes (`<ref>`, `<box>` on a grid of 0-999) stay in the text. A file is for testing when its name says so.
"""

import pathlib
import re
from collections.abc import Callable, Iterator

from medplib_jax.data.build.importers.example import Example, json_rows
from medplib_jax.data.build.mecovqa import is_held_out, may_hold_records
from medplib_jax.data.errors import DataError

_PICTURE = re.compile(r"Picture \d+:\s*<img>(.*?)</img>\s*")


def read(root: str) -> Iterator[Callable[[], Example]]:
    files = [path for path in sorted(pathlib.Path(root).rglob("*.json")) if may_hold_records(str(path))]
    if not files:
        raise DataError(root, None, "dataset not found", "JSON lists of records", "none")
    for path in files:
        name = str(path.relative_to(root))
        for place, row in json_rows(root, name):
            yield lambda place=place, row=row, split="test" if is_held_out(name) else "train": _example(place, row, split)


def _example(place, row, split) -> Example:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(x, str) for x in turn) for turn in turns):
        raise DataError(*place, "no conversation", "[[question, answer], ...]", repr(turns)[:200])
    images = dict.fromkeys(image for question, _ in turns for image in _PICTURE.findall(question))
    if len(images) != 1:
        raise DataError(*place, "not about one picture", "Picture 1: <img>path</img>", str(list(images)))
    return Example(place, next(iter(images)), split, tuple((_PICTURE.sub("", question).strip(), answer.strip()) for question, answer in turns))
