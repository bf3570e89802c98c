"""Embeds the pictures of a folder with a checkpoint's own CLIP, so that similar ones can serve as examples.

COMMAND
    python -m medplib_jax.datasets.index --images data/pairs --out data/index --checkpoint runs/7b/stage5
    python -m medplib_jax.datasets.index --records data/icl/test/icl.json --out data/index --checkpoint runs/7b/stage5

A folder holds images/, and masks/<image>/<name>.png (see `qa.folder`); of records the targets are taken. Embedding
runs on all devices, a batch at a time, while the next pictures are read. The same command goes on where it was killed,
and later adds new pictures without embedding the others again. `predict --examples` and `datasets.retrieve` search the
index.
"""

import argparse
import collections
import functools
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import Record
from medplib_jax.data.sources import data_root, open_source
from medplib_jax.datasets.command import add_beam, finish, parse, workers_of
from medplib_jax.datasets.embedding import Embedder, batch_key, embed_all, embed_batch
from medplib_jax.datasets.image_index import Entry, IndexWriter
from medplib_jax.datasets.patients import anonymous, check_pattern
from medplib_jax.datasets.processes import HERE, Keeping, Workers, map_shards
from medplib_jax.datasets.qa.folder import scan


class Library(NamedTuple):
    """Pictures that can serve as examples: (picture, its masks by name, patient), paths below `root`."""

    root: str
    pictures: tuple[tuple[str, dict[str, str], str], ...]
    notices: tuple[str, ...] = ()


def library_of_pairs(folder: str, pattern: str = "") -> Library:
    """A folder of pairs. A name of several masks, or of a label map, has no file of its own and is left out by name."""
    check_pattern(pattern)
    pairs, problems = scan(folder, pattern)
    notices, pictures = list(map(str, problems)), []
    for pair in pairs:
        masks, left_out = _one_of_each(pair.image, pair.masks, pair.names)
        notices += left_out
        pictures.append((pair.image, masks, anonymous(pair.patient)))
    return Library(folder, tuple(pictures), tuple(notices))


def library_of_records(file: str) -> Library:
    """The pictures and targets of an ICL annotation file; those of its examples are not known by name.

    A structure of several masks in a picture is left out by name. DataError for a record that does not tell its
    structure, whose files lie elsewhere, or whose picture was another patient's before.
    """
    source, patients, targets, notices = open_source(file, data_root(file)), {}, collections.defaultdict(dict), []
    for record in source:
        image, target = record.images[0], (structure_of(record), str(record.target_mask))
        for name in (image, target[1]):
            record.path(name)  # raises for what lies elsewhere
        targets[image][target] = None
        known = patients.get(image) or record.patient
        if record.patient not in ("", known):
            raise record.error("picture is of another patient in an earlier record", known, record.patient)
        patients[image] = known
    pictures = []
    for image in sorted(targets):
        masks, left_out = _one_of_each(image, list(targets[image]), [name for name, _ in targets[image]])
        notices += left_out
        pictures.append((image, masks, patients[image]))
    return Library(source.root, tuple(pictures), tuple(notices))


def _one_of_each(
    image: str, masks: Sequence[tuple[str, str]], usable: Sequence[str]
) -> tuple[dict[str, str], list[str]]:
    """The masks whose name is one of `usable` and no other's, by name, and what is left out."""
    count = collections.Counter(name for name, _ in masks)
    kept = {name: mask for name, mask in sorted(masks) if count[name] == 1 and name in usable}
    left_out = [name or "label map" for name in count if name not in kept]
    return kept, [f"{image}: {name} is left out; expected one mask of each name" for name in left_out]


def structure_of(record: Record) -> str:
    """What an ICL record asks for. DataError for one that does not tell, or has no target."""
    if record.examples is None or not record.target_mask or not record.structure:
        raise record.error("record does not tell its structure", "examples, target_mask and structure", "none")
    return record.structure


def build(library: Library, out: str, checkpoint_dir: str, batch: int = 64, workers: Workers = HERE) -> dict[str, Any]:
    """Makes the index `out` of a library's pictures, or adds those that it lacks; what is in it.

    A picture that cannot be read has a line with the reason and is never found. This process embeds, or Beam's workers.
    DataError when a picture is not the one that was embedded, or has other masks or another patient since, or the index
    is of another checkpoint.
    """
    embedder = Embedder(checkpoint_dir)
    writer = IndexWriter(out, embedder.digest, embedder.width, batch, library.root)
    new = _new_entries(library, writer.entries)
    batches = [new[start : start + batch] for start in range(0, len(new), batch)]
    if workers.runner:
        embed = functools.partial(embed_batch, checkpoint_dir, library.root, batch)
        key = functools.partial(batch_key, embedder.digest, library.root, batch)
        embedded = map_shards(embed, batches, workers, Keeping(os.path.join(out, ".beam"), key))
    else:
        embedded = embed_all(embedder, library.root, batch, batches)
    for entries, vectors in tqdm(embedded, total=len(batches), desc="embed"):
        writer.add(vectors, entries)
    writer.finish()
    unreadable = [entry.problem for entry in writer.entries if entry.problem]
    counts = {"pictures": len(writer.entries), "embedded_now": len(new), "unreadable": len(unreadable)}
    notices = {"notices": [*unreadable, *library.notices]}
    return counts | {"clip": embedder.digest, "width": embedder.width} | notices


def _new_entries(library: Library, entries: Sequence[Entry]) -> list[Entry]:
    """The pictures that the index lacks. DataError for one that is not as it was when it was embedded."""
    known = {entry.image: entry for entry in entries}
    found = []
    for image, masks, patient in library.pictures:
        file = os.path.join(library.root, image)
        status = os.stat(file)
        new = Entry(image, masks, patient, (status.st_size, status.st_mtime_ns))
        if image in known:
            _check_same(known[image], new, file)
        else:
            found.append(new)
    return found


def _check_same(old: Entry, new: Entry, file: str) -> None:
    expected = "what was indexed, or a new index"
    for field, what in (("status", "has changed"), ("masks", "has other masks"), ("patient", "has another patient")):
        before, now = getattr(old, field), getattr(new, field)
        if before != now:
            raise DataError(file, None, f"picture {what} since it was indexed", expected, f"{now} after {before}"[:200])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images", metavar="DIR", help="folder with images/ and masks/<image>/<name>.png")
    what.add_argument("--records", metavar="FILE", help="annotation file that medplib_jax.datasets.icl made")
    parser.add_argument("--out", required=True, help="folder of the index")
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run, or WORKDIR/checkpoints/STEP")
    parser.add_argument("--batch", type=int, default=64, help="pictures that are embedded together")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in an image's path below images/"
    )
    add_beam(parser)
    given = parse(parser)
    if given.records and given.patient:
        parser.error("--patient: expected with --images, records name their patients")
    from medplib_jax.parallel.compilation import use_cache  # imports JAX, which nothing here needs before

    use_cache()

    def make() -> dict[str, Any]:
        library = library_of_records(given.records) if given.records else library_of_pairs(given.images, given.patient)
        return build(library, given.out, given.checkpoint, given.batch, workers_of(given))

    return finish(make)


if __name__ == "__main__":
    sys.exit(main())
