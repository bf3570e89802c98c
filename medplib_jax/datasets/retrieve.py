"""Gives records of in-context segmentation the examples that look most like their picture.

COMMAND
    python -m medplib_jax.datasets.retrieve --records data/icl/test/icl.json --index data/index \\
        --checkpoint runs/7b/stage5 --out data/icl/test/icl_retrieved.json

As the original's `image_rag.augment`, without its fault: no picture of the record's own patient is an example. The
index is of the same records, or of others below the same folder (`datasets.index --records`); the checkpoint is that of
the index. A record for which nothing is found is left out by name. A patient is known by what the records say: of those
that say nothing only the same picture is excluded, and how many these are is printed.
"""

import argparse
import collections
import os
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from medplib_jax.data.icl_form import MAX_EXAMPLES
from medplib_jax.data.records import Record
from medplib_jax.data.sources import Source, data_root, open_source, read_records
from medplib_jax.datasets.command import finish, parse
from medplib_jax.datasets.embedding import Embedder
from medplib_jax.datasets.files import write_json
from medplib_jax.datasets.image_index import Hit, ImageIndex
from medplib_jax.datasets.index import structure_of

BATCH = 64  # pictures that are embedded together


def retrieve(file: str, index_path: str, checkpoint_dir: str, out: str, top_k: int = MAX_EXAMPLES) -> dict[str, Any]:
    """Writes the records of `file` with other examples to `out`; how many, and what was left out.

    DataError for a record that does not tell its structure, an index of another checkpoint, or of pictures elsewhere.
    """
    index, root, embedder = ImageIndex(index_path), data_root(file), Embedder(checkpoint_dir)
    index.check_weights(embedder.digest)
    source, raw = open_source(file, root), read_records(file)
    groups = collections.defaultdict(list)
    for record in source:
        groups[structure_of(record)].append(record)
    found: dict[int, list[Hit]] = {}
    for name, records in groups.items():
        vectors = _vectors(records, embedder)
        patients, pictures = [one.patient for one in records], [one.path(one.images[0]) for one in records]
        hits = index.search(vectors, top_k, name, patients, pictures)
        found |= {record.index: one for record, one in zip(records, hits, strict=True)}
    kept = [
        _augmented(raw[number], source[number], found[number], name_root=root)
        for number in sorted(found)
        if found[number]
    ]
    write_json(out, kept)
    lost = [f"{file}, record {number}: no example of another patient" for number in sorted(found) if not found[number]]
    return {"records": len(kept), "left_out": len(lost), "notices": [*_unknown_patients(source, index), *lost]}


def _unknown_patients(source: Source, index: ImageIndex) -> list[str]:
    """What to say where a patient's other pictures cannot be kept from the examples."""
    nameless, unknown = (sum(not one.patient for one in some) for some in (source, index.entries))
    records = f"{nameless} of {len(source)} records do not tell their patient"
    pictures = f"{unknown} of {len(index.entries)} pictures do not tell their patient"
    return [f"{source.file}: {records}, whose other pictures may be among the examples"] * bool(nameless) + [
        f"{index.path}: {pictures}, who may be that of the record"
    ] * bool(unknown)


def _vectors(records: Sequence[Record], embedder: Embedder) -> np.ndarray:
    """Unit vectors of the records' pictures, each embedded once."""
    files = [record.path(record.images[0]) for record in records]
    distinct = sorted(set(files))
    parts = [
        embedder(np.stack([embedder.read(file) for file in distinct[start : start + BATCH]]))
        for start in range(0, len(distinct), BATCH)
    ]
    place = {file: row for row, file in enumerate(distinct)}
    return np.concatenate(parts)[[place[file] for file in files]]


def _augmented(raw: dict, record: Record, hits: Sequence[Hit], name_root: str) -> dict:
    """The raw record with other examples, whose paths start where the record's do."""

    def below(path: str) -> str:
        reference = os.path.relpath(os.path.realpath(path), os.path.realpath(name_root))
        record.path(reference)  # raises for what lies elsewhere
        return reference

    name = structure_of(record)
    examples = [{"image": below(hit.image), "mask": below(hit.masks[name])} for hit in hits]
    return raw | {"icl_examples": examples}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", required=True, help="annotation file that medplib_jax.datasets.icl made")
    parser.add_argument("--index", required=True, help="folder that medplib_jax.datasets.index made")
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run, or WORKDIR/checkpoints/STEP")
    parser.add_argument("--out", required=True, help="file to write, beside the records")
    parser.add_argument("--top-k", type=int, choices=range(1, MAX_EXAMPLES + 1), default=MAX_EXAMPLES)
    given = parse(parser)
    from medplib_jax.parallel.compilation import use_cache  # imports JAX, which nothing here needs before

    use_cache()
    return finish(lambda: retrieve(given.records, given.index, given.checkpoint, given.out, given.top_k))


if __name__ == "__main__":
    sys.exit(main())
