"""The phantom's pictures asked in Med-GRIT's form: a name's boxes, a box's name, a box's caption, questions about the
whole picture.

COMMAND
    python -m medplib_jax.datasets.phantom.grit --data data/phantom

Reads the masks of a generated phantom and writes `grit/{train,test}/{VG,ROC,RC,MIA}.json` beside them, and for training
also `grit/train/mixed.json`: two conversations per picture with turns of all tasks, so that a picture is looked at less
often.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from medplib_jax.data.records import modality
from medplib_jax.datasets.files import write_json
from medplib_jax.datasets.phantom.draw import MODALITIES
from medplib_jax.datasets.phantom.text import article, sample
from medplib_jax.datasets.qa import grit
from medplib_jax.datasets.qa.facts import ImageFacts, measure

VERSION = 2  # raise it when the same phantom gives other files
LABELS = {one.prefix: one.label for one in MODALITIES}
MIXED = "grit/train/mixed.json"


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
    for image, facts in sorted(_facts(data).items()):
        split = "test" if "--test_" in image else "train"
        turns = make_turns(facts, facts.generator(seed, "grit"))
        for task, made in turns.items():
            files[file_of(split, task)] += [grit.record(facts, turn) for turn in made]
        if split == "train":
            files[MIXED] += mixed(facts, turns, facts.generator(seed, "mixed"))
    for name, records in files.items():
        write_json(str(data / name), records)
    counts = {name: len(records) for name, records in sorted(files.items())}
    write_json(str(manifest), {"made_from": made_from, "records": counts})
    return counts


def make_turns(facts: ImageFacts, rng: np.random.Generator) -> dict[str, list[grit.Turn]]:
    """By task: VG for each name, ROC and RC for each name's first instance, MIA one question about the modality."""
    turns, label = {task: [] for task in grit.TASKS}, LABELS[facts.modality]
    for target in facts.targets:
        turns["VG"].append(grit.find_turn(facts, target, rng))
        turns["ROC"].append(grit.name_turn(facts, target, rng))
        request = grit.caption_request(facts, target, rng)
        turns["RC"].append((request, f"{label} image: the {target.name}."))
    same = rng.random() < 0.5
    others = [other for other in LABELS.values() if other != label]
    asked = label if same else others[int(rng.integers(len(others)))]
    turns["MIA"].append((f"Is this {article(asked)} image?", "Yes." if same else "No."))
    return turns


def mixed(facts: ImageFacts, turns: dict[str, list[grit.Turn]], rng: np.random.Generator) -> list[dict]:
    """Two records with turns of all tasks: every name's boxes, and every name once where its box is given. A box that
    one turn tells is never another's question."""
    named = [turns[("ROC", "RC")[int(rng.integers(2))]][i] for i in range(len(facts.targets))]
    return [_conversation(facts, sample(rng, chosen)) for chosen in (turns["VG"], named + turns["MIA"])]


def _conversation(facts: ImageFacts, turns: list[grit.Turn]) -> dict:
    first, *others = turns
    record = grit.record(facts, first)
    record["conversations"] += [list(turn) for turn in others]
    return record


def _facts(data: Path) -> dict[str, ImageFacts]:
    """Of every picture with a visible name."""
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
    return ImageFacts(f"images/{stem}.png", targets[0].size, modality(stem), targets, touching)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of a generated phantom")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(json.dumps(write_grit(arguments.data, arguments.seed), indent=1))


if __name__ == "__main__":
    main()
