"""What a language model answered, checked.

Descriptions and questions that name known structures only, in the form that was asked for. An answer of another form is
`BadAnswer`; single questions that cannot be used are left out and named. Paths and boxes are put in here.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import check_complete, parse_record
from medplib_jax.datasets.qa import grit
from medplib_jax.datasets.qa.facts import ImageFacts, Target
from medplib_jax.datasets.qa.records import Turn, leaks, record
from medplib_jax.datasets.qa.template import pick
from medplib_jax.datasets.sides import contradiction

LONGEST = 2000  # characters of one text
_REF = re.compile(r"<ref>(.*?)</ref>")
_TAG = re.compile(r"<[^<>]*>")
_THINKING = re.compile(r"<think>.*?</think>", re.DOTALL)
_TELLTALE = re.compile(
    r"\b(descri(?:bed|ption)|captions?|annotat\w+|facts?|provided|"
    r"the (?:text|list|structures? listed|information given))\b",
    re.IGNORECASE,
)
_MASKS = re.compile(r"\b(masks?|segmentations?)\b", re.IGNORECASE)  # grounding may ask for one


class BadAnswer(ValueError):
    """The whole answer cannot be used; the message tells the model why."""


class _BadItem(ValueError):
    """One question cannot be used."""


@dataclasses.dataclass
class Questions:
    """What could be used of an answer. captions: by structure; problems: (what, the item) of those left out."""

    turns: list[Turn] = dataclasses.field(default_factory=list)
    captions: dict[str, str] = dataclasses.field(default_factory=dict)
    problems: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def parse_description(text: str, targets: Sequence[Target]) -> str:
    """The description, with <ref> around known structures. BadAnswer when it is missing or marks anything else."""
    value = _object(text).get("description")
    try:
        description = _text(value, "description")
    except _BadItem as error:
        raise BadAnswer(str(error)) from error
    phrases = _REF.findall(description)
    if "<" in _REF.sub("", description) or ">" in _REF.sub("", description) or any("<" in phrase for phrase in phrases):
        raise BadAnswer("the description may hold no tags but <ref>...</ref>")
    unknown = [phrase for phrase in phrases if meant(phrase, targets) is None]
    if unknown:
        raise BadAnswer(f"<ref> marks {unknown[0]!r}, which is none of the stated structures")
    if targets and not phrases:
        raise BadAnswer("no structure is marked by <ref>")
    return description


def plain(description: str) -> str:
    return _REF.sub(r"\1", description)


def with_boxes(description: str, facts: ImageFacts) -> str:
    """The description in Med-GRIT's form: boxes after each marked phrase."""
    return _REF.sub(
        lambda match: grit.referred(facts, match[1], grit.boxes(meant(match[1], facts.targets))), description
    )


def meant(phrase: str, targets: Sequence[Target]) -> Target | None:
    """The structure that a phrase names: the one with the longest name in it; None when there is none."""
    words = f" {_normal(phrase)} "
    named = [target for target in targets if f" {_normal(target.name)} " in words]
    return max(named, key=lambda target: len(target.name), default=None)


def _normal(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def parse_questions(text: str, facts: ImageFacts, targets: Sequence[Target], rng: np.random.Generator) -> Questions:
    """The usable questions and captions about these structures. BadAnswer when there is no question at all."""
    value, found = _object(text), Questions()
    by_name = {target.name: target for target in targets}
    makers: dict[str, Callable[[dict], Turn]] = {
        "vqa": lambda item: _turn("vqa", item),
        "region": lambda item: _region(item, by_name, rng),
        "grounding": lambda item: _grounding(item, by_name),
    }
    for kind, make in makers.items():
        for item in _items(value, kind, found):
            try:
                found.turns.append(_checked(make(item), facts))
            except _BadItem as error:
                found.problems.append((f"{kind} question cannot be used", f"{error}: {json.dumps(item)[:300]}"))
    for item in _items(value, "captions", found):
        try:
            target, caption = _target(item.get("name"), by_name), _plain_text(item.get("caption"), "caption")
            _check_place(caption, target)
            found.captions.setdefault(target.name, caption)
        except _BadItem as error:
            found.problems.append(("caption cannot be used", f"{error}: {json.dumps(item)[:300]}"))
    if not found.turns:
        first = ": ".join(found.problems[0]) if found.problems else "all lists are empty"
        raise BadAnswer(f"it holds no usable question; the first problem: {first}")
    return found


def _object(text: str) -> dict[str, Any]:
    """The JSON object in an answer, which may stand between other words."""
    text = _THINKING.sub("", text)
    start, end = text.find("{"), text.rfind("}")
    try:
        value = json.loads(text[start : end + 1])
    except (ValueError, RecursionError) as error:
        raise BadAnswer(f"it is not one JSON object: {error}") from error
    if not isinstance(value, dict):
        raise BadAnswer("it is not one JSON object")
    return value


def _items(value: dict[str, Any], key: str, found: Questions) -> list[dict]:
    items = value.get(key, [])
    if not isinstance(items, list):
        items = [items]
    found.problems += [
        (f"{key} item is not an object", json.dumps(item)[:300]) for item in items if not isinstance(item, dict)
    ]
    return [item for item in items if isinstance(item, dict)]


def _text(value: Any, name: str, grounding: bool = False) -> str:
    """A text of one line that does not speak of how it was made; of masks only in grounding."""
    if not isinstance(value, str) or not value.strip():
        raise _BadItem(f"{name} is not a text")
    value = " ".join(value.split())
    if len(value) > LONGEST:
        raise _BadItem(f"{name} is longer than {LONGEST} characters")
    if match := _TELLTALE.search(value) or (None if grounding else _MASKS.search(value)):
        raise _BadItem(f"{name} speaks of {match[0]!r}")
    return value


def _plain_text(value: Any, name: str, grounding: bool = False) -> str:
    text = _text(value, name, grounding)
    if _TAG.search(text):
        raise _BadItem(f"{name} holds the tag {_TAG.search(text)[0]}")
    return text


def _choices(item: dict) -> tuple[str, ...]:
    choices = item.get("choices") or []
    if not isinstance(choices, list) or len(choices) > 6:
        raise _BadItem("choices are not a list of up to six")
    choices = tuple(_plain_text(choice, "choice") for choice in choices)
    if len(choices) == 1 or len(set(map(_normal, choices))) != len(choices):
        raise _BadItem("choices are not different from each other")
    return choices


def _turn(kind: str, item: dict, question: str | None = None) -> Turn:
    choices, answer = _choices(item), _plain_text(item.get("answer"), "answer")
    if choices:
        same = [choice for choice in choices if _normal(choice) == _normal(answer)]
        if not same:
            raise _BadItem("the answer is none of the choices")
        answer = same[0]
    return Turn(kind, question or _plain_text(item.get("question"), "question"), answer, choices)


def _region(item: dict, by_name: dict[str, Target], rng: np.random.Generator) -> Turn:
    target, question = _target(item.get("name"), by_name), _text(item.get("question"), "question")
    if _TAG.findall(question) != ["<region>"]:
        raise _BadItem("the question does not hold <region> once and no other tag")
    turn = _turn("region", item, question.replace("<region>", f"<region>{pick(rng, target.masks)}</region>"))
    if not turn.candidates and meant(question, [target]):
        raise _BadItem("the question names the structure")
    _check_place(f"{turn.question} {turn.answer}", target)
    return turn


def _check_place(text: str, target: Target) -> None:
    if words := contradiction(text, target.relative_box):
        raise _BadItem(f"the {target.name} is not in the {words}")


def _grounding(item: dict, by_name: dict[str, Target]) -> Turn:
    names = item.get("names")
    if not isinstance(names, list) or not 1 <= len(names) <= 2:
        raise _BadItem("names are not a list of one or two")
    targets = [_target(name, by_name) for name in names]
    answer = _text(item.get("answer"), "answer", grounding=True)
    if _TAG.findall(answer) != ["<SEG>"] * len(targets):
        raise _BadItem("the answer does not hold one <SEG> for each name and no other tag")
    parts = answer.split("<SEG>")
    for target, part in zip(targets, parts, strict=False):
        if f" {_normal(target.name)} " not in f" {_normal(part)} ":
            raise _BadItem(f"<SEG> does not follow the name {target.name!r}")
    masks = [f"<SEG><mask>{target.merged}</mask>" for target in targets]
    answer = "".join(part + mask for part, mask in zip(parts, [*masks, ""], strict=True))
    return Turn(
        "grounding" if len(targets) == 1 else "grounding_pairs",
        _plain_text(item.get("question"), "question", grounding=True),
        answer,
    )


def _target(name: Any, by_name: dict[str, Target]) -> Target:
    if not isinstance(name, str) or name not in by_name:
        raise _BadItem(f"{name!r} is none of the structures")
    return by_name[name]


def _checked(turn: Turn, facts: ImageFacts) -> Turn:
    """The turn, when it does not give its answer away and is a record that training can read."""
    if leaks(turn):
        raise _BadItem("the question contains its answer")
    try:
        check_complete(parse_record(record(facts, [turn]), "answer", 0, ""))
    except DataError as error:
        raise _BadItem(error.what) from error
    return turn
