"""What is suspicious in a dataset: checks over the facts of all records.

Each finding names one record and says what about it.
"""

import collections
import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.audit.facts import MaskFacts, RecordFacts
from medplib_jax.datasets.sides import MARGIN, SIDE, contradiction

FULL = 0.98  # share of the picture from which a mask is called full
TINY = 16 / 512**2  # share of the picture below which a mask is hardly visible to any model
MAJORITY, ENOUGH = 0.8, 5  # a custom of a collection: this share of at least so many cases

_LATERAL = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_CHOICE = re.compile(r"\bor\b|\b[A-D][).:]", re.IGNORECASE)
_WORD = re.compile(r"[a-z]+|\d+")
_TRIVIAL = {
    "yes",
    "no",
    "not",
    "the",
    "a",
    "an",
    "is",
    "it",
    "none",
    "normal",
    "abnormal",
    "left",
    "right",
    "both",
    "image",
    "other",
}


@dataclasses.dataclass(frozen=True)
class AuditFinding:
    """One suspicious record."""

    kind: str
    source: str
    record: int
    detail: str
    mask: str = ""  # which of its masks, where one is meant

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def find(facts: Sequence[RecordFacts]) -> list[AuditFinding]:
    """Every finding, in the order of `CHECKS`."""
    usable = [one for one in facts if one.problem is None]
    findings = [
        AuditFinding(f"unusable: {one.problem.what.split(' (')[0]}", one.source, one.record, describe(one.problem))
        for one in facts
        if one.problem is not None
    ]
    for kind, check in CHECKS.items():
        findings += [AuditFinding(kind, one.source, one.record, detail, mask) for one, detail, mask in check(usable)]
    return findings


def describe(problem: DataError) -> str:
    """The problem, and the picture's name where it lies in one; the record's name stands beside it."""
    where = f"{os.path.basename(problem.file)}: " if problem.record is None else ""
    detail = [f"{name} {value}" for name, value in (("expected", problem.expected), ("found", problem.found)) if value]
    return where + "; ".join(filter(None, [problem.what, ", ".join(detail)]))


Found = Iterator[tuple[RecordFacts, str, str]]


def odd_files(facts: Sequence[RecordFacts]) -> Found:
    for one in facts:
        if one.notices:
            yield one, ", ".join(one.notices), ""


def full_masks(facts: Sequence[RecordFacts]) -> Found:
    for one, mask in _masks(facts):
        if mask.area >= FULL:
            yield one, f"covers {mask.area:.0%} of the picture", mask.name


def tiny_masks(facts: Sequence[RecordFacts]) -> Found:
    for one, mask in _masks(facts):
        if mask.area < TINY and not mask.name.startswith(("point:", "scribble:")):
            yield one, f"covers {mask.area:.2g} of the picture", mask.name


def misplaced(facts: Sequence[RecordFacts]) -> Found:
    """The text says where in the picture something is, and its only mask lies elsewhere.

    A mask that reaches the place counts as there.
    """
    for one in facts:
        if len(one.masks) != 1:
            continue
        mask = one.masks[0]
        if words := contradiction(one.text, mask.box):
            yield one, f'the text says "{words}", the mask\'s centre is at x {mask.x:.0%}, y {mask.y:.0%}', mask.name


def wrong_side(facts: Sequence[RecordFacts]) -> Found:
    """A left or right organ on the other side than its collection has it nearly always.

    CT, for one, shows the patient's left on the right.
    """
    sides = collections.defaultdict(list)
    for one, mask in _masks(facts):
        word = _side_of(mask, one)
        if word and abs(mask.x - 0.5) > MARGIN:
            shown = "left" if mask.x < 0.5 else "right"
            sides[_collection(one)].append((one, mask, word, shown))
    for cases in sides.values():
        same = sum(word == shown for *_, word, shown in cases)
        share = max(same, len(cases) - same) / len(cases)
        if len(cases) < ENOUGH or share < MAJORITY:
            continue
        custom = same * 2 > len(cases)
        for one, mask, word, shown in cases:
            if (word == shown) != custom:
                yield (
                    one,
                    f'"{word}" is shown on the {shown} here, in {share:.0%} of its collection on the other side',
                    mask.name,
                )


def same_place(facts: Sequence[RecordFacts]) -> Found:
    """The left and the right one of a pair lie on each other in one picture."""
    pairs = collections.defaultdict(dict)
    for one, mask in _masks(facts):
        word = _side_of(mask, one) if mask.label else ""
        if word:
            pairs[one.images[-1], _LATERAL.sub("", mask.label)].setdefault(word, []).append((one, mask))
    for sides in pairs.values():
        for one, mask in sides.get("right", ()):
            other = max(
                (left for _, left in sides.get("left", ())), key=lambda left: _overlap(left.box, mask.box), default=None
            )
            if other and _overlap(other.box, mask.box) > 0.5:
                yield one, f'lies where "{other.label}" lies ({other.name})', mask.name


def same_mask(facts: Sequence[RecordFacts]) -> Found:
    """The same pixels of a picture are called by different names."""
    names = collections.defaultdict(set)
    for one, mask in _masks(facts):
        if mask.label:
            names[one.images[-1], mask.hash].add(mask.label)
    for one, mask in _masks(facts):
        others = sorted(names[one.images[-1], mask.hash] - {mask.label}) if mask.label else []
        if others:
            yield one, f'the mask of "{mask.label}" is pixel for pixel that of "{", ".join(others)}"', mask.name


def other_class(facts: Sequence[RecordFacts]) -> Found:
    """The mask marks one class, and its question and answer name only others that the dataset knows."""
    vocabulary = {frozenset(words) for _, mask in _masks(facts) if (words := _label_words(mask.label))}
    for one, mask in _masks(facts):
        own, text = _label_words(mask.label), set(_words(_round(one, mask)))
        if not own or own & text or _stems(own) & _stems(text) or _is_denied(one, mask):
            continue
        named = sorted(" ".join(sorted(words)) for words in vocabulary if words <= text)
        if named:
            yield one, f'the mask is of "{mask.label}", the text names {", ".join(named[:3])}', mask.name


def duplicates(facts: Sequence[RecordFacts]) -> Found:
    groups = collections.defaultdict(list)
    for one in facts:
        masks = tuple(mask.name for mask in one.masks if mask.in_question)
        groups[one.held_out, one.images, masks, one.examples, tuple(map(_normal, one.questions))].append(one)
    for first, *others in groups.values():
        for other in others:
            same = tuple(map(_normal, first.answers)) == tuple(map(_normal, other.answers))
            answer = (
                "the same answer"
                if same
                else f'another answer: "{_first(first.answers)}" and "{_first(other.answers)}"'
            )
            yield other, f"asks what {first.source}, record {first.record} asks, with {answer}", ""


def leaks(facts: Sequence[RecordFacts]) -> Found:
    """The answer stands in the question, which does not offer a choice."""
    for one in facts:
        if one.task in ("grounding", "closed"):
            continue
        for question, answer in zip(one.questions, one.answers, strict=False):
            words = _normal(answer).split()
            meaningful = [word for word in words if word not in _TRIVIAL and len(word) > 2]
            if meaningful and not _CHOICE.search(question) and f" {' '.join(words)} " in f" {_normal(question)} ":
                yield one, f'"{answer}" stands in the question "{question}"', ""


def same_picture(facts: Sequence[RecordFacts]) -> Found:
    training = {
        shown: one for one in facts if not one.held_out for shown in (*one.example_hashes, one.picture_hash) if shown
    }
    for one in facts:
        if one.held_out and one.picture_hash in training:
            other = training[one.picture_hash]
            yield one, f"its picture is that of {other.source}, record {other.record} ({other.images[0]})", ""


def own_example(facts: Sequence[RecordFacts]) -> Found:
    """The picture in question, or another one of its patient, is shown as an example."""
    patients = {one.picture_hash: one.patient for one in facts if one.patient}
    for one in facts:
        for (image, _), shown in zip(one.examples, one.example_hashes, strict=True):
            if shown == one.picture_hash:
                yield one, f"its own picture is an example ({image})", ""
            elif one.patient and patients.get(shown) == one.patient:
                yield one, f"an example is of its own patient ({image})", ""


def same_patient(facts: Sequence[RecordFacts]) -> Found:
    training = {one.patient: one for one in facts if not one.held_out and one.patient}
    for one in facts:
        if one.held_out and one.patient in training:
            other = training[one.patient]
            yield one, f"{one.patient} is in {other.source}, record {other.record}, too", ""


CHECKS: dict[str, Callable[[Sequence[RecordFacts]], Found]] = {
    "mask and text are at different places": misplaced,
    "left and right swapped": wrong_side,
    "left and right at one place": same_place,
    "one mask has two names": same_mask,
    "mask of another class than the text names": other_class,
    "picture or mask is not plain and was converted": odd_files,
    "mask covers the whole picture": full_masks,
    "mask is tiny": tiny_masks,
    "question asked twice": duplicates,
    "answer stands in the question": leaks,
    "example of the own picture or patient": own_example,
    "held-out picture is in the training data": same_picture,
    "held-out patient is in the training data": same_patient,
}


def _masks(facts: Sequence[RecordFacts]) -> Iterator[tuple[RecordFacts, MaskFacts]]:
    return ((one, mask) for one in facts for mask in one.masks)


def _round(one: RecordFacts, mask: MaskFacts) -> str:
    """The question and answer that the mask belongs to."""
    number = mask.turn // 2
    return " ".join(one.questions[number : number + 1] + one.answers[number : number + 1])


def _is_denied(one: RecordFacts, mask: MaskFacts) -> bool:
    """The mask's question asks whether it is something else, and the answer is no."""
    answers = one.answers[mask.turn // 2 :]
    return mask.in_question and bool(answers) and _normal(answers[0]).split()[:1] == ["no"]


def _collection(one: RecordFacts) -> str:
    """Records that share one way of showing left and right: collection and, for slices, the plane."""
    parts = one.images[0].split("/")[-1].split("--")
    plane = parts[-1].split("_")[0] if len(parts) > 3 else ""
    return "--".join([*parts[:2], plane])


def _side_of(mask: MaskFacts, one: RecordFacts) -> str:
    """left or right, when the mask's label says one of them.

    Without a label, the text of a record with this mask alone.
    """
    text = mask.label or (SIDE.sub("", one.text) if len(one.masks) == 1 else "")
    found = {word.lower() for word in _LATERAL.findall(text)}
    return found.pop() if len(found) == 1 else ""


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0.0) * max(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def _label_words(label: str) -> frozenset[str]:
    return frozenset(word for word in _words(label) if len(word) > 2 and not word.isdecimal()) - _TRIVIAL


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _stems(words) -> set[str]:
    """Beginnings of words, so that plurals and adjectives (lungs, pulmonary aside) meet their nouns."""
    return {word[:5] for word in words if len(word) > 3}


def _normal(text: str) -> str:
    return " ".join(_words(text))


def _first(answers: Sequence[str]) -> str:
    return answers[0] if answers else ""
