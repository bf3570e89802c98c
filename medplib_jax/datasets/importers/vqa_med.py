"""ImageCLEF VQA-Med 2019, 2020 and 2021, all archives (and those in them) unpacked below one folder.

Lines "image|question|answer", "image|category|question|answer" (test set of 2019), or "image|question" with
"image|answer|answer..." in a second file (test sets of 2020 and 2021). Pictures are looked for below the folder of
their annotation file. Of several answers, between "#" in 2019, the first is used, without the parts in brackets, which
are optional there. 2021 has no training set of its own: it is that of 2020.
"""

import functools
import os
import pathlib
import re
from collections.abc import Callable, Iterator

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.importers.example import ImportedExample, answer_type

_PLAIN, _CATEGORIES = 3, 4  # fields of a line with its answer
# annotation file -> (split, fields of a line or file of the answers)
FILES = {
    "All_QA_Pairs_train.txt": ("train", _PLAIN),
    "All_QA_Pairs_val.txt": ("validation", _PLAIN),
    "VQAMed2019_Test_Questions_w_Ref_Answers.txt": ("test", _CATEGORIES),
    "VQAnswering_2020_Train_QA_pairs.txt": ("train", _PLAIN),
    "VQAnswering_2020_Val_QA_Pairs.txt": ("validation", _PLAIN),
    "VQAMed2020-Task1-VQAnswering-Test-Questions.txt": (
        "test",
        "VQAMed2020-Task1-VQAnswering-Test-ReferenceAnswers.txt",
    ),
    "VQA-Med-2021-VQAnswering-Task1-New-ValidationSet.txt": ("validation", _PLAIN),
    "Task1-VQA-2021-TestSet-Questions.txt": ("test", "Task1-VQA-2021-TestSet-ReferenceAnswers.txt"),
}
ANSWERS = tuple(form for _, form in FILES.values() if isinstance(form, str))
_OPTIONAL = re.compile(r"\s*\([^()]*\)\s*")


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    files = [path for path in sorted(pathlib.Path(root).rglob("*.txt")) if path.name in FILES]
    if not files:
        raise DataError(root, None, "dataset not found", ", ".join(FILES), "none")
    for path in files:
        split, form = FILES[path.name]
        answers = form if isinstance(form, int) else _answers(path.parent / form)
        pictures = {picture.stem: os.path.relpath(picture, root) for picture in sorted(path.parent.rglob("*.jpg"))}
        folder = os.path.relpath(path.parent, root)
        for index, line in enumerate(_lines(path)):
            if line.strip():
                place = (str(path), index)
                yield functools.partial(_example, place, line, split, answers, pictures, folder)


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    except OSError as error:
        raise DataError(
            str(path), None, "annotation file cannot be read", "lines with | between fields", str(error)
        ) from error


def _answers(path: pathlib.Path) -> dict[str, str]:
    """The first answer about each image."""
    rows = [[field.strip() for field in line.split("|")] for line in _lines(path)]
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _example(place, line, split, answers, pictures, folder) -> ImportedExample:
    fields = [field.strip() for field in line.split("|")]
    if isinstance(answers, dict):
        fields = [*fields, answers.get(fields[0], "")]
    count = answers if isinstance(answers, int) else _PLAIN
    if len(fields) != count or not all(fields):
        raise DataError(*place, "line of another form", f"{count} fields, answer included, none empty", line)
    answer = fields[-1]
    if count == _CATEGORIES:
        answer = answer.split("#")[0].strip()
        answer = _OPTIONAL.sub(" ", answer).strip() or answer
    image = pictures.get(fields[0], os.path.join(folder, f"{fields[0]}.jpg"))
    return ImportedExample(place, image, split, ((fields[-2], answer),), "", answer_type(answer))
