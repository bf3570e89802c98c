"""Refer-and-ground conversations in Med-GRIT's form: {"id", "conversations": [[question, answer], ...]}.

Tasks: VG (a name, find its boxes), ROC (a box, name it), RC (a box, describe it), MIA (describe the image with boxes).
A question begins with `Picture 1: <img>path</img>`; a phrase is `<ref>...</ref>` and is followed by its boxes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medplib_jax.datasets.mecovqa import stem
from medplib_jax.datasets.qa.facts import ImageFacts, Target
from medplib_jax.datasets.qa.grid import Box, box_text, to_grid
from medplib_jax.datasets.qa.template import LISTED, article, enumerate_names, pick, share, verb

TASKS = ("VG", "ROC", "RC", "MIA")
Turn = tuple[str, str]  # question and answer


def turns(facts: ImageFacts, rng: np.random.Generator) -> dict[str, list[Turn]]:
    """Turns by task: one per name, and one for the whole image; none without targets."""
    if not facts.targets:
        return {task: [] for task in TASKS}
    made = {
        task: [make(facts, target, rng) for target in facts.targets]
        for task, make in (("VG", find_turn), ("ROC", name_turn), ("RC", _describe))
    }
    return {**made, "MIA": [_analyse(facts, rng)]}


def record(facts: ImageFacts, turn: Turn) -> dict[str, Any]:
    question, answer = turn
    return {
        "id": stem(facts.image),
        "conversations": [[f"Picture 1: <img>{facts.image}</img>\n{question}", answer]],
        "modality": facts.modality,
    }


def boxes(target: Target) -> Sequence[Box]:
    """A box for each instance, or, where there are too many to list, one around all."""
    return target.boxes if len(target.boxes) <= LISTED else (target.box,)


def referred(facts: ImageFacts, phrase: str, around: Sequence[Box]) -> str:
    """The phrase with pixel boxes around what it means."""
    return f"<ref>{phrase}</ref>{''.join(box_text(to_grid(box, facts.size)) for box in around)}"


def find_turn(facts: ImageFacts, target: Target, rng: np.random.Generator) -> Turn:
    """VG: where a name is."""
    phrase = f"<ref>the {target.name}</ref>"
    question = pick(
        rng,
        (
            f"Where {verb(target.name)} {phrase} in this image?",
            f"Please find {phrase} in this image.",
            f"Point out {phrase}.",
        ),
    )
    return question, referred(facts, f"the {target.name}", boxes(target))


def name_turn(facts: ImageFacts, target: Target, rng: np.random.Generator) -> Turn:
    """ROC: what one instance is."""
    region = referred(facts, "this region", [pick(rng, target.boxes)])
    return pick(rng, (f"What is shown in {region}?", f"Name the structure in {region}.")), f"The {target.name}."


def caption_request(facts: ImageFacts, target: Target, rng: np.random.Generator) -> str:
    """The question of RC."""
    region = referred(facts, "this region", [target.box])
    return pick(rng, (f"Describe {region}.", f"Give a short caption of {region}."))


def analysis_request(rng: np.random.Generator) -> str:
    """The question of MIA."""
    return pick(rng, ("Analyse this medical image.", "Describe this image and point out what you see."))


def _describe(facts: ImageFacts, target: Target, rng: np.random.Generator) -> Turn:
    return caption_request(facts, target, rng), f"{_sentence(facts)} {_place(target)}"


def _analyse(facts: ImageFacts, rng: np.random.Generator) -> Turn:
    phrases = [referred(facts, f"the {target.name}", boxes(target)) for target in facts.targets]
    return analysis_request(rng), " ".join(
        [f"{_sentence(facts)[:-1]} with {enumerate_names(phrases)}.", *map(_place, facts.targets)]
    )


def _sentence(facts: ImageFacts) -> str:
    return f"This is {article(facts.label)} image." if facts.label else "This is a medical image."


def _place(target: Target) -> str:
    """A sentence on where a name lies and how large it is, as far as its mask tells."""
    name, is_are = f"The {target.name}", verb(target.name)
    where = (
        f"{is_are} in the {target.place} of the image"
        if target.is_compact
        else f"{'spreads' if is_are == 'is' else 'spread'} over much of the image"
    )
    size = f"{share(target.area)}" if target.area >= 0.01 else "less than 1 percent"
    return f"{name} {where} and {'covers' if is_are == 'is' else 'cover'} {size} of it."
