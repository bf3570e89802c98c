"""A generated dataset in MeCoVQA's on-disk form.

Eight stylised modalities with anatomy, findings, masks and questions of all kinds. It lets the whole programme (four
stages, evaluation, demo) run anywhere without licensed data. Every image depends only on (seed, split, index), so the
same arguments give the same bytes with any number of processes, and a larger dataset begins with the smaller one.
"""

import functools
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from medplib_jax.datasets.phantom import text
from medplib_jax.datasets.phantom.draw import MODALITIES, Modality, Scene, draw_scene
from medplib_jax.datasets.processes import map_items

VERSION = 4  # raise it when the same arguments give other files
LABELS = tuple(modality.label for modality in MODALITIES)
FILES = {
    "train": {
        "align": "train/align.json",
        "complex": "train/MeCoVQA-Complex.json",
        "region": "train/MeCoVQA-Complex_local+Region.json",
        "grounding": "train/MeCoVQA-Grounding.json",
    },
    "test": {
        "complex": "test/MeCoVQA_Complex_VQA_test.json",
        "region": "test/MeCoVQA_Region_VQA_test.json",
        "grounding": "test/MeCoVQA_Grounding_test.json",
    },
}


def is_phantom(folder: str | os.PathLike) -> bool:
    """Whether a data folder was made by `generate`: its pictures are drawings."""
    file = Path(folder) / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"version", "examples", "test_examples", "seed"} <= manifest.keys()


def generate(
    out_dir: str | os.PathLike,
    examples: int,
    test_examples: int,
    seed: int = 0,
    processes: int | None = None,
    modalities: Sequence[str] = (),
) -> dict:
    """Writes the dataset below `out_dir`; returns its manifest.

    `examples` training and `test_examples` test images with masks and records. A folder whose `manifest.json` says that
    it is complete is left as it is; an interrupted one is written anew. `processes`: None takes every core.
    `modalities`: prefixes of those that are drawn, by default all. Raises ValueError for counts below 1, for a modality
    that is not known, and when `out_dir` holds a phantom made with other arguments.
    """
    if examples < 1 or test_examples < 1:
        raise ValueError(
            f"phantom: examples and test_examples must be at least 1, found {examples} and {test_examples}"
        )
    out = Path(out_dir)
    drawn = [one for one in MODALITIES if not modalities or one.prefix in modalities]
    if unknown := set(modalities) - {one.prefix for one in MODALITIES}:
        raise ValueError(f"phantom: modalities {sorted(unknown)} are not among {[one.prefix for one in MODALITIES]}")
    wanted = {"version": VERSION, "examples": examples, "test_examples": test_examples, "seed": seed}
    wanted |= {"modalities": [one.prefix for one in drawn]} if modalities else {}
    manifest_file = out / "manifest.json"
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text())
        found = {key: value for key, value in manifest.items() if key != "records"}
        if found != wanted:
            advice = "choose another folder or remove this one"
            raise ValueError(f"{manifest_file}: holds a phantom of {found}, expected {wanted}; {advice}")
        return manifest
    for folder in ("images", "masks", "masks_merged", "train", "test"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = [("train", index) for index in range(examples)] + [("test", index) for index in range(test_examples)]
    records = {split: {kind: [] for kind in files} for split, files in FILES.items()}
    for (split, _), made in zip(
        jobs,
        tqdm(
            map_items(functools.partial(_write_example, out, seed, drawn), jobs, processes),
            total=len(jobs),
            desc="phantom",
        ),
        strict=True,
    ):
        for kind, new in made.items():
            records[split][kind].extend(new)
    for split, files in FILES.items():
        for kind, name in files.items():
            (out / name).write_text(json.dumps(records[split][kind], indent=1) + "\n")
    counts = {name: len(records[split][kind]) for split, files in FILES.items() for kind, name in files.items()}
    manifest = {**wanted, "records": counts}
    partial = manifest_file.with_suffix(".partial")
    partial.write_text(json.dumps(manifest, indent=1) + "\n")
    partial.replace(manifest_file)
    return manifest


def _write_example(out: Path, seed: int, drawn: Sequence[Modality], job: tuple[str, int]) -> dict[str, list[dict]]:
    """Paint, save and describe one image; returns its records by kind."""
    split, index = job
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    scene = draw_scene(drawn[index % len(drawn)], rng)
    facts = _save(out, f"{scene.modality.prefix}_00--phantom--{split}_{index:05d}--2d_none", scene)
    if split == "train":
        turns = {
            "align": text.align_turns(facts, rng),
            "complex": text.complex_turns(facts, rng, LABELS, more_presence=2),
            "region": text.region_turns(facts, rng),
            "grounding": text.grounding_turns(facts, rng),
        }
        return {kind: [text.conversation(facts, turns)] for kind, turns in turns.items() if turns}
    turns = {
        "complex": text.sample(rng, text.complex_turns(facts, rng, LABELS, more_presence=0), 3),
        "region": text.region_turns(facts, rng)[:2],
        "grounding": text.grounding_turns(facts, rng)[:3],
    }
    return {kind: text.single_records(facts, turns) for kind, turns in turns.items()}


def _save(out: Path, stem: str, scene: Scene) -> text.SceneFacts:
    """Write the image, each instance's mask and each name's united mask (0/255), and say what is visible."""
    _write_png(out / "images" / f"{stem}.png", scene.image)
    targets = []
    for name in dict.fromkeys(instance.name for instance in scene.instances):
        instances = [instance for instance in scene.instances if instance.name == name]
        label = name.replace(" ", "_")
        files = tuple(f"masks/{stem}--{label}_{number:03d}.png" for number in range(len(instances)))
        for file, instance in zip(files, instances, strict=True):
            _write_png(out / file, _grey(instance.mask))
        united, merged = instances[0].mask, f"masks_merged/{stem}--{label}.png"
        if len(instances) == 1:
            shutil.copyfile(out / files[0], out / merged)
        else:
            united = np.logical_or.reduce([instance.mask for instance in instances])
            _write_png(out / merged, _grey(united))
        columns = united.sum(axis=0)
        centre_x = float(columns @ np.arange(len(columns)) / columns.sum() / len(columns))
        targets.append(text.SceneTarget(name, instances[0].finding, files, merged, centre_x))
    visible = {target.name for target in targets}
    modality = scene.modality
    names = [(thing.name, False) for thing in modality.structures] + [(thing.name, True) for thing in modality.findings]
    return text.SceneFacts(
        f"images/{stem}.png", modality.label, tuple(targets), tuple(entry for entry in names if entry[0] not in visible)
    )


def _grey(mask: np.ndarray) -> np.ndarray:
    """A bool mask as 0 and 255."""
    return mask.view(np.uint8) * np.uint8(255)


def _write_png(path: Path, pixels: np.ndarray):
    Image.fromarray(pixels).save(path, compress_level=1)
