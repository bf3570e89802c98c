"""Refer-and-ground conversations in Med-GRIT's form: {"id", "conversations": [[question, answer], ...]}.

Tasks: VG (a name, find its boxes), ROC (a box, name it), RC (a box, describe it), MIA (describe the image with boxes).
A question begins with `Picture 1: <img>path</img>`; a phrase is `<ref>...</ref>` and is followed by its boxes.
"""

from typing import Any

import numpy as np

from medplib_jax.data.build.mecovqa import stem
from medplib_jax.data.build.qa.facts import Facts, Target
from medplib_jax.data.build.qa.grid import box_text, to_grid
from medplib_jax.data.build.qa.template import article, enumerate_names, pick, share, verb

TASKS = ("VG", "ROC", "RC", "MIA")


def records(facts: Facts, rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    """Records by task: one per name, and one for the whole image; none without targets."""
    if not facts.targets:
        return {task: [] for task in TASKS}
    made = {task: [make(facts, target, rng) for target in facts.targets] for task, make in (("VG", _find), ("ROC", _name), ("RC", _describe))}
    made["MIA"] = [_analyse(facts, rng)]
    return {task: [_record(facts, turn) for turn in turns] for task, turns in made.items()}


def _record(facts: Facts, turn: tuple[str, str]) -> dict[str, Any]:
    question, answer = turn
    return {"id": stem(facts.image), "conversations": [[f"Picture 1: <img>{facts.image}</img>\n{question}", answer]], "modality": facts.modality}


def _box(facts: Facts, target: Target) -> str:
    return box_text(to_grid(target.box, facts.size))


def _find(facts: Facts, target: Target, rng: np.random.Generator) -> tuple[str, str]:
    name = f"<ref>the {target.name}</ref>"
    question = pick(rng, (f"Where {verb(target.name)} {name} in this image?", f"Please find {name} in this image.", f"Point out {name}."))
    return question, f"{name}{_box(facts, target)}"


def _name(facts: Facts, target: Target, rng: np.random.Generator) -> tuple[str, str]:
    region = f"<ref>this region</ref>{_box(facts, target)}"
    return pick(rng, (f"What is shown in {region}?", f"Name the structure in {region}.")), f"The {target.name}."


def _describe(facts: Facts, target: Target, rng: np.random.Generator) -> tuple[str, str]:
    region = f"<ref>this region</ref>{_box(facts, target)}"
    question = pick(rng, (f"Describe {region}.", f"Give a short caption of {region}."))
    return question, f"{_sentence(facts)} {_place(target)}"


def _analyse(facts: Facts, rng: np.random.Generator) -> tuple[str, str]:
    question = pick(rng, ("Analyse this medical image.", "Describe this image and point out what you see."))
    phrases = [f"<ref>the {target.name}</ref>{_box(facts, target)}" for target in facts.targets]
    return question, " ".join([f"{_sentence(facts)[:-1]} with {enumerate_names(phrases)}.", *map(_place, facts.targets)])


def _sentence(facts: Facts) -> str:
    return f"This is {article(facts.label)} image." if facts.label else "This is a medical image."


def _place(target: Target) -> str:
    """A sentence on where a name lies and how large it is, as far as its mask tells."""
    name, is_are = f"The {target.name}", verb(target.name)
    where = f"{is_are} in the {target.place} of the image" if target.is_compact else f"{'spreads' if is_are == 'is' else 'spread'} over much of the image"
    size = f"{share(target.area)}" if target.area >= 0.01 else "less than 1 percent"
    return f"{name} {where} and {'covers' if is_are == 'is' else 'cover'} {size} of it."
