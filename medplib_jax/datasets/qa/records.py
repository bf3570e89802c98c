"""Turns about one image, and the records made of them, in MeCoVQA's form."""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from medplib_jax.data.errors import DataError
from medplib_jax.data.records import MASK, REGION
from medplib_jax.datasets.patients import anonymous
from medplib_jax.datasets.qa.facts import ImageFacts

KINDS = ("vqa", "region", "grounding", "grounding_pairs")  # a file each, so that a file holds questions of one kind
TURNS = 4  # about the whole image in one training conversation
YES_NO = ("Yes", "No")


@dataclasses.dataclass(frozen=True)
class Turn:
    """One question and its answer. `candidates`: the answers to choose from, of a closed question. `structure`: what
    alone it is about, for figures by structure.
    """

    kind: str
    question: str
    answer: str
    candidates: tuple[str, ...] = ()
    structure: str = ""

    @property
    def answer_type(self) -> str:
        return "closed" if self.candidates else "open"


class Writer(Protocol):
    """Makes turns from facts, image by image; what it has to say of the whole run goes into the manifest."""

    def write(self, facts: Sequence[ImageFacts]) -> Iterator["Written"]: ...

    def report(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True)
class Written:
    """What a writer made of one image. grit: (question, answer) by task of Med-GRIT; problems: what it left out."""

    facts: ImageFacts
    turns: list[Turn] = dataclasses.field(default_factory=list)
    grit: dict[str, list[tuple[str, str]]] = dataclasses.field(default_factory=dict)
    problems: list[DataError] = dataclasses.field(default_factory=list)


def leaks(turn: Turn) -> bool:
    """Whether the question says the answer of an open question, or one candidate alone of a closed one."""
    question = _words(REGION.sub(" ", turn.question))
    if turn.candidates:
        return sum(_contains(question, _words(candidate)) for candidate in turn.candidates) == 1
    if turn.kind.startswith("grounding"):  # a mask is asked for, and a name may be
        return False
    return _contains(question, _words(MASK.sub(" ", turn.answer)))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _contains(words: Sequence[str], part: Sequence[str]) -> bool:
    return bool(part) and any(words[i : i + len(part)] == part for i in range(len(words) - len(part) + 1))


def training_records(facts: ImageFacts, turns: Sequence[Turn]) -> dict[str, list[dict[str, Any]]]:
    """Records for training by kind.

    Conversations of up to `TURNS` turns about the image, and a record for each turn with regions or masks.
    """
    vqa = [turn for turn in turns if turn.kind == "vqa"]
    records = {"vqa": [record(facts, vqa[start : start + TURNS]) for start in range(0, len(vqa), TURNS)]}
    for kind in KINDS[1:]:
        records[kind] = [record(facts, [turn]) for turn in turns if turn.kind == kind]
    return records


def test_records(facts: ImageFacts, turns: Sequence[Turn]) -> dict[str, list[dict[str, Any]]]:
    """Records by kind, one per turn."""
    return {kind: [record(facts, [turn]) for turn in turns if turn.kind == kind] for kind in KINDS}


def record(facts: ImageFacts, turns: Sequence[Turn]) -> dict[str, Any]:
    """One record; `answer_type`, `candidates` and `structure` are those of its only turn."""
    messages = []
    for turn in turns:
        messages.append({"from": "human", "value": turn.question if messages else f"<image>\n{turn.question}"})
        messages.append({"from": "gpt", "value": turn.answer})
    extra = {}
    if len(turns) == 1:
        extra = {
            "answer_type": turns[0].answer_type,
            **({"candidates": list(turns[0].candidates)} if turns[0].candidates else {}),
            **({"structure": turns[0].structure} if turns[0].structure else {}),
        }
    return {
        "image": facts.image,
        "conversations": messages,
        **extra,
        "modality": facts.modality,
        "patient": anonymous(facts.patient),
        **({"spacing": list(facts.spacing)} if facts.spacing else {}),
    }
