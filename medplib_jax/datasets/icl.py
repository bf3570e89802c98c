"""Makes records of in-context segmentation out of a folder of images with named masks.

COMMAND
    python -m medplib_jax.datasets.icl --pairs data/pairs --out data/icl [--held-out "spleen;left kidney"]

The folder: images/, masks/<image>/<name>.png (see `qa.folder`). For every image and every structure with a mask in it,
a record asks for that structure after one to three examples: other patients' images of the same modality with their
masks of the same structure. Structures `--held-out` come in test records only. All images of a patient are in one
split, those of examples too. The result: images/, masks/, train/icl.json, test/icl.json, manifest.json, skipped.jsonl.
The same folder and seed give the same files.
"""

import argparse
import collections
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from medplib_jax.data import images
from medplib_jax.data.errors import DataError
from medplib_jax.data.icl_form import MAX_EXAMPLES
from medplib_jax.datasets.command import finish, parse, window
from medplib_jax.datasets.files import Folder
from medplib_jax.datasets.patients import anonymous, check_pattern, split_of
from medplib_jax.datasets.qa.folder import read_all, scan

SPLITS = ("train", "test")


@dataclasses.dataclass(frozen=True)
class IclOptions:
    """How records are made.

    repeats: records of each image and structure, each with other examples. test_share: of the patients. held_out: names
    of structures that no training record asks for. window, patient: see `write_qa`. Test records have as many examples
    as there are, up to three, so that an evaluation may show fewer; training records a random number of them.
    """

    seed: int = 0
    repeats: int = 1
    test_share: float = 0.1
    held_out: tuple[str, ...] = ()
    window: images.Window | None = None
    patient: str = ""

    def __post_init__(self):
        if self.repeats < 1:
            raise ValueError(f"repeats: expected at least 1, found {self.repeats}")
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test share: expected a number in [0, 1], found {self.test_share}")
        check_pattern(self.patient)


class Candidate(NamedTuple):
    """A structure in an image: a target, or an example for others."""

    image: str
    mask: str
    structure: str
    modality: str
    patient: str
    split: str
    spacing: tuple[float, float] | None  # mm between the image's rows and between its columns, where known


def make_icl(pairs: str, out: str, options: IclOptions) -> dict[str, Any]:
    """Makes the dataset `out` of the folder `pairs`; returns its manifest.

    What cannot be used is named in skipped.jsonl. DataError when the folder has no image, or a held-out structure no
    mask.
    """
    found, problems = scan(pairs, options.patient)
    with Folder(out, "icl", pairs) as folder:
        candidates = []
        for facts, errors in read_all(found, folder, window=options.window):
            problems += errors
            if facts:
                split = split_of(facts.patient, options.test_share)
                candidates += [
                    Candidate(
                        facts.image, target.merged, target.name, facts.modality, facts.patient, split, facts.spacing
                    )
                    for target in facts.targets
                ]
        names = {candidate.structure for candidate in candidates}
        if unknown := sorted(set(options.held_out) - names):
            raise DataError(pairs, None, "held-out structure has no mask", ", ".join(sorted(names)), unknown[0])
        records, alone = _records(candidates, options)
        problems += alone
        for split, made in records.items():
            folder.write_json(f"{split}/icl.json", made)
        manifest = dataclasses.asdict(options) | {
            "images": len({candidate.image for candidate in candidates}),
            "patients": len({candidate.patient for candidate in candidates}),
            "structures": dict(sorted(collections.Counter(one.structure for one in candidates).items())),
            **folder.write_problems(problems),
            "records": {f"{split}/icl.json": len(made) for split, made in records.items()},
            "notices": [
                f"no {split} record: choose another --test-share" for split, made in records.items() if not made
            ],
        }
        folder.write_json("manifest.json", manifest)
    return manifest


def _records(candidates: Sequence[Candidate], options: IclOptions) -> tuple[dict[str, list], list[DataError]]:
    """The records of each split, and an error for every target that no other patient has."""
    alike = collections.defaultdict(list)
    for candidate in candidates:
        alike[candidate.structure, candidate.modality, candidate.split].append(candidate)
    records, problems = {split: [] for split in SPLITS}, []
    for number, target in enumerate(candidates):
        if target.split == "train" and target.structure in options.held_out:
            continue
        others = alike[target.structure, target.modality, target.split]
        others = [other for other in others if other.patient != target.patient]
        if not others:
            expected = f"a {target.structure} of another patient of the {target.split} split"
            problems.append(DataError(target.image, None, "no example", expected, "none"))
            continue
        for repeat in range(options.repeats if target.split == "train" else 1):
            rng = np.random.default_rng([options.seed, number, repeat])
            records[target.split].append(_record(target, others, rng))
    return records, problems


def _record(target: Candidate, others: Sequence[Candidate], rng: np.random.Generator) -> dict[str, Any]:
    count = MAX_EXAMPLES if target.split == "test" else int(rng.integers(1, MAX_EXAMPLES + 1))
    chosen = rng.permutation(len(others))[:count]
    return {
        "image": target.image,
        "target_mask": target.mask,
        "icl_examples": [{"image": others[i].image, "mask": others[i].mask} for i in chosen],
        "structure": target.structure,
        "patient": anonymous(target.patient),
        **({"spacing": list(target.spacing)} if target.spacing else {}),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="folder with images/ and masks/<image>/<name>.png")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=IclOptions.seed)
    parser.add_argument("--repeats", type=int, default=IclOptions.repeats, help="training records of each mask")
    parser.add_argument("--test-share", type=float, default=IclOptions.test_share, help="share of the patients")
    parser.add_argument("--held-out", default="", metavar="NAME;NAME", help="structures that only test records ask for")
    parser.add_argument("--window", type=window, help="centre,width of the grey that pictures of 16 bits are shown in")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in an image's path below images/"
    )
    given = parse(parser)

    def make() -> dict[str, Any]:
        held_out = tuple(name.strip() for name in given.held_out.split(";") if name.strip())
        options = IclOptions(given.seed, given.repeats, given.test_share, held_out, given.window, given.patient)
        return make_icl(given.pairs, given.out, options)

    return finish(make)


if __name__ == "__main__":
    sys.exit(main())
