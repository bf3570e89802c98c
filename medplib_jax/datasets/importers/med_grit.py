"""Med-GRIT-270k: JSON files of {"id", "conversations": [[question, answer], ...]} beside the images/ of SA-Med2D-20M.

The picture is what <img>...</img> names, where that is a file below the folder, else images/ with its file name, or
with the record's id, by which the authors' own program finds it. Phrases and boxes (`<ref>`, `<box>` on a grid of
0-999) stay in the text. A file is for testing when its name says so.
"""

import os
import pathlib
import re
from collections.abc import Callable, Iterator

from medplib_jax.data.errors import DataError
from medplib_jax.data.splits import annotation_files, is_held_out
from medplib_jax.datasets.importers.example import ImportedExample, first_existing, json_rows

_PICTURE = re.compile(r"Picture \d+:\s*<img>(.*?)</img>\s*")


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    own = pathlib.Path(root, "grit")  # in a folder that `write_qa` made
    files, _ = annotation_files(str(own if own.is_dir() else root), deep=True)
    if not files:
        raise DataError(root, None, "dataset not found", "JSON lists of records", "none")
    for path in files:
        name = os.path.relpath(path, root)
        split = "test" if is_held_out(name) else "train"
        for place, row in json_rows(root, name):
            yield lambda place=place, row=row, split=split: _example(root, place, row, split)


def _example(root, place, row, split) -> ImportedExample:
    turns = row.get("conversations") if isinstance(row, dict) else None
    if (
        not isinstance(turns, list)
        or not turns
        or not all(
            isinstance(turn, list) and len(turn) == 2 and all(isinstance(x, str) for x in turn) for turn in turns
        )
    ):
        raise DataError(*place, "no conversation", "[[question, answer], ...]", repr(turns)[:200])
    images = dict.fromkeys(image for question, _ in turns for image in _PICTURE.findall(question))
    if len(images) != 1:
        raise DataError(*place, "not about one picture", "Picture 1: <img>path</img>", str(list(images)))
    (named,) = images
    image = first_existing(root, [named, f"images/{pathlib.PurePosixPath(named).name}", f"images/{row.get('id')}.png"])
    return ImportedExample(
        place, image, split, tuple((_PICTURE.sub("", question).strip(), answer.strip()) for question, answer in turns)
    )
