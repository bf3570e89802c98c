"""The phantom's pictures asked in Med-GRIT's form: a name's boxes, a box's name, a box's caption, questions about the
whole picture.

COMMAND
    python -m medplib_jax.datasets.phantom.grit --data data/phantom

Reads the masks of a generated phantom and writes `grit/{train,test}/{VG,ROC,RC,MIA}.json` beside them, one question a
record. For training also conversations of several turns, so that a picture is looked at less often: with answers of
words in `grit/train/look.json`, with boxes in the other three. A conversation asks of every name once, so that no
answer tells a later one. From others a model learns to read its own conversation and not to look. `find.json` asks of
all that is there, `findings.json` and `rough.json` of findings alone, which may lie anywhere: where a structure lies
can be guessed from its name, and who mostly guesses does not learn to look. Boxes to learn from are rounded, to tenths
of the picture in `rough.json`, else to hundredths: digits that a small model cannot know are noise, in which it takes
long to find those that it can.
"""

import argparse
import dataclasses
import functools
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from medplib_jax.data.records import modality
from medplib_jax.datasets.files import write_json
from medplib_jax.datasets.phantom.draw import MODALITIES
from medplib_jax.datasets.phantom.text import article, sample
from medplib_jax.datasets.processes import map_items
from medplib_jax.datasets.qa import grit
from medplib_jax.datasets.qa.facts import ImageFacts, Target, measure
from medplib_jax.datasets.qa.template import pick

VERSION = 5  # raise it when the same phantom gives other files
ANYWHERE = {finding.name for one in MODALITIES for finding in one.findings}
LABELS = {one.prefix: one.label for one in MODALITIES}
LOOK, ROUGH, FINDINGS, FIND = (f"grit/train/{name}.json" for name in ("look", "rough", "findings", "find"))
ROUNDS = 2  # of conversations per picture, which ask in other words and of other things
NAMED = 5  # names at most that a conversation asks about


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
                files[LOOK].append(_conversation(facts, looking(facts, kinds, rng)))
                files[FIND].append(_conversation(facts, finding(facts, facts.targets, 10, rng)))
                if findings := [target for target in facts.targets if target.name in ANYWHERE]:
                    files[FINDINGS].append(_conversation(facts, finding(facts, findings, 10, rng)))
                    files[ROUGH].append(_conversation(facts, finding(facts, findings, 100, rng)))
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


def looking(facts: ImageFacts, kinds: Sequence[str], rng: np.random.Generator) -> list[grit.Turn]:
    """A conversation whose answers are words: of the whole picture or not, then of a box of every name.

    A box comes first in every second one. Else an answer at the beginning could only be boxes, as in `finding`.
    """
    turns = make_turns(facts, kinds, rng)
    first = turns["MIA"] if rng.random() < 0.5 else []
    return first + [turns[pick(rng, ("ROC", "RC"))][i] for i in sample(rng, range(len(facts.targets)), NAMED)]


def finding(facts: ImageFacts, targets: Sequence[Target], step: int, rng: np.random.Generator) -> list[grit.Turn]:
    """A conversation whose answers are boxes rounded to `step` thousandths of the picture, of every target."""
    asked = [grit.find_turn(facts, target, rng) for target in sample(rng, targets, NAMED)]
    return [(request, rounded(answer, step)) for request, answer in asked]


def rounded(text: str, step: int) -> str:
    """The text with each number of its boxes in the middle of its `step`: by 10, (157,242) becomes (155,245)."""
    return re.sub(r"(?<=[(,])\d+(?=[,)])", lambda number: f"{int(number[0]) // step * step + step // 2}", text)


def _conversation(facts: ImageFacts, turns: list[grit.Turn]) -> dict:
    first, *others = turns
    record = grit.record(facts, first)
    record["conversations"] += [list(turn) for turn in others]
    return record


def _facts(data: Path) -> dict[str, ImageFacts]:
    """Of every picture with a visible name; boxes of one name go from left to right."""
    masks: dict[str, dict[str, list[Path]]] = defaultdict(functools.partial(defaultdict, list))  # which is pickled
    for path in sorted((data / "masks").iterdir()):
        stem, label = path.stem.rsplit("--", 1)
        masks[stem][label.rsplit("_", 1)[0].replace("_", " ")].append(path)
    return dict(zip(masks, map_items(_measured, list(masks.items())), strict=True))


def _measured(picture: tuple[str, dict[str, list[Path]]]) -> ImageFacts:
    stem, named = picture
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
