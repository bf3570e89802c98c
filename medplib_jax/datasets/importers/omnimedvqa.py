"""OmniMedVQA: QA_information/{Open-access,Restricted-access}/*.json beside Images/.

It is for evaluation: everything is test.
"""

import pathlib
from collections.abc import Callable, Iterator

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.importers.example import ImportedExample, json_rows, text


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    files = sorted(pathlib.Path(root, "QA_information").glob("*/*.json"))
    if not files:
        raise DataError(root, None, "dataset not found", "QA_information/Open-access/*.json", "none")
    for file in files:
        for place, row in json_rows(root, str(file.relative_to(root))):
            yield lambda place=place, row=row: _example(place, row)


def _example(place, row) -> ImportedExample:
    question, answer = text(row, "question", place), text(row, "gt_answer", place)
    options = {
        letter: str(row[f"option_{letter}"]).strip() for letter in "ABCD" if row.get(f"option_{letter}") is not None
    }
    if answer not in options.values():
        raise DataError(*place, "answer is not among the options", "one of option_A ...", answer)
    question += "".join(f"\n{letter}. {option}" for letter, option in options.items())
    modality = text(row, "modality_type" if "modality_type" in row else "modality", place)
    return ImportedExample(
        place,
        text(row, "image_path", place),
        "test",
        ((question, answer),),
        modality,
        "closed",
        tuple(options.values()),
    )
