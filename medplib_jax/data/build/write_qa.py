"""Writes questions and answers about a folder of images with named masks: VQA, region VQA, grounding, refer-and-ground conversations.

COMMAND
    python -m medplib_jax.data.build.write_qa --pairs data/mine --out data/mine_qa --writer template
    python -m medplib_jax.train --config=configs/finetune_folder.py:data/mine_qa ...

The folder: images/, masks/<image>/<name>.png, and if you like metadata.json (see `qa.folder`). The result is a dataset in MeCoVQA's form
(images/, masks/, train/, test/) with Med-GRIT's conversations beside it (grit/train, grit/test), manifest.json and skipped.jsonl.
The same folder and seed give the same files. All images of one patient or volume, where file names tell it, are in one split.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from medplib_jax.data.build.mecovqa import parse_image_name, stem, write_json
from medplib_jax.data.build.qa import grit, records, template
from medplib_jax.data.build.qa.facts import Facts
from medplib_jax.data.build.qa.folder import Pair, read_facts, scan, vocabulary
from medplib_jax.data.errors import DataError

VERSION = 1  # raise it when the same arguments give other files
_IN_PROCESS = 64  # fewer images are not worth starting processes for
Write = Callable[[Sequence[Facts]], Iterator[tuple[Facts, list[records.Turn], list[DataError]]]]


@dataclasses.dataclass(frozen=True)
class Options:
    """seed: of the sentences. test_share: of the images. complete: a name of the modality without a mask is not in the image."""

    seed: int = 0
    test_share: float = 0.1
    complete: bool = False

    def __post_init__(self):
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test share: expected a number in [0, 1], found {self.test_share}")


def write_qa(pairs: str, out: str, write: Write, options: Options) -> dict[str, Any]:
    """Makes the dataset `out` of the folder `pairs`; returns its manifest. DataError when the folder has no image.

    write: makes turns from facts, as `template_writer` does. An image or mask that cannot be used is named in skipped.jsonl.
    """
    found, problems = scan(pairs)
    facts = []
    for one, errors in _read_all(found, out, options.complete):
        problems += errors
        facts += [one] if one else []
    by_file, by_task = {}, {}
    for one, turns, errors in write(facts):
        problems += errors
        split = "test" if _fraction(one.image) < options.test_share else "train"
        made = (records.test_records if split == "test" else records.training_records)(one, turns)
        for kind, new in made.items():
            by_file.setdefault(f"{split}/{kind}.json", []).extend(new)
        for task, new in grit.records(one, _generator(options.seed, one, "grit")).items():
            by_task.setdefault(f"grit/{split}/{task}.json", []).extend(new)
    manifest = {
        "version": VERSION, **dataclasses.asdict(options), "images": len(facts), "masks": sum(len(target.masks) for one in facts for target in one.targets),
        "modalities": dict(sorted(Counter(one.modality for one in facts).items())), "skipped": len(problems),
        "records": {name: len(made) for name, made in sorted({**by_file, **by_task}.items())},
    }  # fmt: skip
    _save(out, {**by_file, **by_task}, problems, manifest)
    return manifest


def _save(out: str, files: dict[str, list], problems: Sequence[DataError], manifest: dict[str, Any]) -> None:
    for kind in records.KINDS:  # of an earlier run, whose split may have been another one
        for split in ("train", "test"):
            Path(out, split, f"{kind}.json").unlink(missing_ok=True)
    for name, made in files.items():
        if made:
            write_json(os.path.join(out, name), made)
    with open(os.path.join(out, "skipped.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem.as_dict()) + "\n" for problem in problems)
    write_json(os.path.join(out, "manifest.json"), manifest)


def _read_all(pairs: Sequence[Pair], out: str, complete: bool) -> Iterator[tuple[Facts | None, list[DataError]]]:
    names = vocabulary(pairs) if complete else {}
    jobs = [(pair, tuple(name for name in names.get(pair.modality, ()) if name not in pair.names)) for pair in pairs]
    read = functools.partial(_read, out)
    progress = functools.partial(tqdm, total=len(jobs), desc="masks", unit="image")
    if len(jobs) < _IN_PROCESS:
        yield from progress(map(read, jobs))
        return
    with concurrent.futures.ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from progress(pool.map(read, jobs, chunksize=8))


def _read(out: str, job: tuple[Pair, tuple[str, ...]]) -> tuple[Facts | None, list[DataError]]:
    try:
        return read_facts(job[0], out, job[1])
    except DataError as error:
        return None, [error]


def _fraction(image: str) -> float:
    """A number in [0, 1) that depends on the image's patient or volume, else on its name."""
    key = parse_image_name(image).patient or stem(image)
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64


def _generator(seed: int, facts: Facts, what: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{what} {stem(facts.image)}".encode()).digest()
    return np.random.default_rng([seed, int.from_bytes(digest[:8], "big")])


def template_writer(seed: int) -> Write:
    """Turns from `template`; an image about which nothing can be asked is an error."""

    def write(facts: Sequence[Facts]) -> Iterator[tuple[Facts, list[records.Turn], list[DataError]]]:
        for one in facts:
            turns = template.turns(one, _generator(seed, one, "template"))
            yield one, turns, [] if turns else [DataError(one.image, None, "nothing to ask about", "a mask or a modality", "neither")]

    return write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help="folder with images/ and masks/<image>/<name>.png")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--writer", choices=("template",), default="template")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument("--test-share", type=float, default=Options.test_share, help="share of the images whose questions are kept for testing")
    parser.add_argument("--complete", action="store_true", help="masks are complete: a name of the modality without a mask is not in the image")
    arguments = parser.parse_args()
    options = Options(arguments.seed, arguments.test_share, arguments.complete)
    manifest = write_qa(arguments.pairs, arguments.out, template_writer(options.seed), options)
    print(json.dumps(manifest, indent=1))


if __name__ == "__main__":
    main()
