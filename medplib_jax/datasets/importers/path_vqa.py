"""PathVQA as Parquet, the form on the Hugging Face hub.

The authors' own archive holds pickle files, which can run code when they are read; they are not supported.
"""

from collections.abc import Callable, Iterator

from medplib_jax.datasets.importers.example import ImportedExample, parquet_example, parquet_rows


def read(root: str) -> Iterator[Callable[[], ImportedExample]]:
    for place, split, row in parquet_rows(root):
        yield lambda place=place, split=split, row=row: parquet_example(place, split, row, "histopathology")
