"""The phantom's pictures asked in Med-GRIT's form: a name's boxes, a box's name, a box's caption, questions about the
whole picture.

COMMAND
    python -m medplib_jax.datasets.phantom.grit --data data/phantom

Reads the masks of a generated phantom and writes `grit/{train,test}/{VG,ROC,RC,MIA}.json` beside them, one question a
record. For training also conversations of several turns, so that a picture is looked at less often:
`grit/train/look.json` has answers of words, `grit/train/find.json` has boxes. The first turn of a conversation can be
answered from the picture alone, and the others tell little of it. From answers that name the kind of image, or each
other's boxes, a model learns to read its own conversation and not to look.
"""

import argparse
import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medplib_jax.data.records import modality
from medplib_jax.datasets.files import write_json
from medplib_jax.datasets.phantom.draw import MODALITIES
from medplib_jax.datasets.phantom.text import article, sample
from medplib_jax.datasets.qa import grit
from medplib_jax.datasets.qa.facts import ImageFacts, measure
from medplib_jax.datasets.qa.template import pick

VERSION = 3  # raise it when the same phantom gives other files
LABELS = {one.prefix: one.label for one in MODALITIES}
LOOK, FIND = "grit/train/look.json", "grit/train/find.json"
ROUNDS = 2  # of conversations per picture, which ask in other words and of other things
NAMED, PRESENCE, FOUND = 3, 3, 3  # turns of a conversation about boxes, about what is there, about where it is


def file_of(split: str, task: str) -> str:
    return f"grit/{split}/{task}.json"


def write_grit(data: str | Path, seed: int = 0) -> dict[str, int]:
    """Writes the files; returns how many records each has.

    What is there already from the same phantom is left as it is.
    """
    data = Path(data)
    made_from = {"version": VERSION, "seed": seed, "phantom": json.loads((data / "manifest.json").read_text())}
    manifest = data / "grit" / "manifest.json"
    if manifest.exists() and (found := json.loads(manifest.read_text()))["made_from"] == made_from:
        return found["records"]
    files: dict[str, list] = defaultdict(list)
    found = _facts(data)
    kinds = [one.label for one in MODALITIES if one.prefix in {facts.modality for facts in found.values()}]
    for image, facts in sorted(found.items()):
        split = "test" if "--test_" in image else "train"
        turns = make_turns(facts, kinds, facts.generator(seed, "grit"))
        for task, made in turns.items():
            files[file_of(split, task)] += [grit.record(facts, turn) for turn in made]
        if split == "train":
            rng = facts.generator(seed, "conversations")
            for _ in range(ROUNDS):
                files[LOOK] += [_conversation(facts, turns) for turns in looking(facts, kinds, rng)]
                files[FIND] += [_conversation(facts, turns) for turns in finding(facts, kinds, rng)]
    for name, records in files.items():
        write_json(str(data / name), records)
    counts = {name: len(records) for name, records in sorted(files.items())}
    write_json(str(manifest), {"made_from": made_from, "records": counts})
    return counts


def make_turns(facts: ImageFacts, kinds: Sequence[str], rng: np.random.Generator) -> dict[str, list[grit.Turn]]:
    """By task: VG for each name, ROC and RC for each name's first instance, MIA one question about the modality."""
    turns, label = {task: [] for task in grit.TASKS}, LABELS[facts.modality]
    for target in facts.targets:
        turns["VG"].append(grit.find_turn(facts, target, rng))
        turns["ROC"].append(grit.name_turn(facts, target, rng))
        request = grit.caption_request(facts, target, rng)
        turns["RC"].append((request, f"{label} image: the {target.name}."))
    others = [other for other in kinds if other != label]
    same = not others or rng.random() < 0.5
    asked = label if same else pick(rng, others)
    turns["MIA"].append((f"Is this {article(asked)} image?", "Yes." if same else "No."))
    return turns


def looking(facts: ImageFacts, kinds: Sequence[str], rng: np.random.Generator) -> Iterator[list[grit.Turn]]:
    """Two conversations whose answers are words: of boxes, and of the whole picture and one box."""
    turns = make_turns(facts, kinds, rng)
    named = [turns[pick(rng, ("ROC", "RC"))][i] for i in sample(rng, range(len(facts.targets)), NAMED)]
    yield named
    yield turns["MIA"] + make_turns(facts, kinds, rng)["MIA"] + presence_turns(facts, rng) + named[-1:]


def finding(facts: ImageFacts, kinds: Sequence[str], rng: np.random.Generator) -> Iterator[list[grit.Turn]]:
    """Conversations whose answers are boxes, of every name once."""
    turns = sample(rng, make_turns(facts, kinds, rng)["VG"])
    yield from (turns[start : start + FOUND] for start in range(0, len(turns), FOUND))


def presence_turns(facts: ImageFacts, rng: np.random.Generator) -> list[grit.Turn]:
    """Whether some names that the image's kind may show are there."""
    kind = next(one for one in MODALITIES if one.prefix == facts.modality)
    there = {target.name for target in facts.targets}
    names = [one.name for one in (*kind.structures, *kind.findings)]
    return [
        (f"Is there {article(name)} in this image?", "Yes." if name in there else "No.")
        for name in sample(rng, names, PRESENCE)
    ]


def _conversation(facts: ImageFacts, turns: list[grit.Turn]) -> dict:
    first, *others = turns
    record = grit.record(facts, first)
    record["conversations"] += [list(turn) for turn in others]
    return record


def _facts(data: Path) -> dict[str, ImageFacts]:
    """Of every picture with a visible name; boxes of one name go from left to right."""
    masks: dict[str, dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for path in sorted((data / "masks").iterdir()):
        stem, label = path.stem.rsplit("--", 1)
        masks[stem][label.rsplit("_", 1)[0].replace("_", " ")].append(path)
    return {stem: _measured(stem, named) for stem, named in masks.items()}


def _measured(stem: str, named: dict[str, list[Path]]) -> ImageFacts:
    arrays = {
        name: [(np.asarray(Image.open(path)) > 0).astype(np.uint8) for path in paths] for name, paths in named.items()
    }
    references = {name: (tuple(f"masks/{path.name}" for path in paths), "") for name, paths in named.items()}
    targets, touching = measure(arrays, references)
    targets = tuple(dataclasses.replace(target, boxes=tuple(sorted(target.boxes))) for target in targets)
    return ImageFacts(f"images/{stem}.png", targets[0].size, modality(stem), targets, touching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of a generated phantom")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(write_grit(arguments.data, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
