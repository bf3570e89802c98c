"""ImageCLEF VQA-Med 2019 and 2020, all archives unpacked below one folder: lines "image|question|answer" beside folders of images.

The test set of 2019 has lines "image|category|question|answer", several answers with "#" between them: the first is used.
"""

import os
import pathlib
from collections.abc import Callable, Iterator

from medplib_jax.data.build.importers.example import Example, answer_type
from medplib_jax.data.errors import DataError

# annotation file -> (split, folder of images beside it)
FILES = {
    "All_QA_Pairs_train.txt": ("train", "Train_images"),
    "All_QA_Pairs_val.txt": ("validation", "Val_images"),
    "VQAMed2019_Test_Questions_w_Ref_Answers.txt": ("test", "VQAMed2019_Test_Images"),
    "VQAnswering_2020_Train_QA_pairs.txt": ("train", "VQAnswering_2020_Train_images"),
    "VQAnswering_2020_Val_QA_Pairs.txt": ("validation", "VQAnswering_2020_Val_images"),
}


def read(root: str) -> Iterator[Callable[[], Example]]:
    files = [path for path in sorted(pathlib.Path(root).rglob("*.txt")) if path.name in FILES]
    if not files:
        raise DataError(root, None, "dataset not found", ", ".join(FILES), "none")
    for path in files:
        split, images = FILES[path.name]
        folder = os.path.relpath(path.parent / images, root)
        for index, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
            if line.strip():
                yield lambda place=(str(path), index), line=line, split=split, folder=folder: _example(place, line, split, folder)


def _example(place, line, split, folder) -> Example:
    fields = [field.strip() for field in line.split("|")]
    count = 4 if split == "test" else 3
    if len(fields) != count or not all(fields):
        raise DataError(*place, "line of another form", f"{count} fields with | between them", line)
    answer = fields[-1].split("#")[0].strip()
    return Example(place, f"{folder}/{fields[0]}.jpg", split, ((fields[-2], answer),), "", answer_type(answer))
