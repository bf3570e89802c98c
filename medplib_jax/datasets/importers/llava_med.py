"""LLaVA-Med's alignment 500k, as the authors' scripts download it.

llava_med_alignment_500k.json, alone or in alignment/, beside images/. Its key is spelt "conversatons"; both spellings
are read.
"""

from collections.abc import Callable, Iterator

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.importers.example import ImportedExample, existing, json_rows, text

_FILES = ("llava_med_alignment_500k.json", "alignment/llava_med_alignment_500k.json")
_MODALITIES = {"chest_xray": "x_ray", "mri": "mr", "ct_scan": "ct", "histology": "histopathology"}


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    for place, row in json_rows(root, existing(root, _FILES)[0]):
        yield lambda place=place, row=row: _example(place, row)


def _example(place, row) -> ImportedExample:
    image = text(row, "image", place)
    messages = row.get("conversatons", row.get("conversations"))
    if not isinstance(messages, list) or not messages or len(messages) % 2:
        raise DataError(*place, "no conversation", "pairs of question and answer", repr(messages))
    values = [text(message, "value", place).replace("<image>", "").strip() for message in messages]
    domain = row.get("domain")
    modality = (
        next((_MODALITIES[name] for name, there in domain.items() if there and name in _MODALITIES), "")
        if isinstance(domain, dict)
        else ""
    )
    return ImportedExample(
        place, f"images/{image}", "train", tuple(zip(values[::2], values[1::2], strict=True)), modality
    )
