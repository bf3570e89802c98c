"""VQA-RAD as on OSF: "VQA_RAD Dataset Public.json" beside "VQA_RAD Image Folder/". Test: phrase types that begin with "test"."""

from collections.abc import Callable, Iterator

from medplib_jax.data.build.importers.example import Example, json_rows, text


def read(root: str) -> Iterator[Callable[[], Example]]:
    for place, row in json_rows(root, "VQA_RAD Dataset Public.json"):
        yield lambda place=place, row=row: _example(place, row)


def _example(place, row) -> Example:
    question, answer = text(row, "question", place), text(row, "answer", place)
    split = "test" if text(row, "phrase_type", place).startswith("test") else "train"
    image = f"VQA_RAD Image Folder/{text(row, 'image_name', place)}"
    return Example(place, image, split, ((question, answer),), "", text(row, "answer_type", place).lower())
