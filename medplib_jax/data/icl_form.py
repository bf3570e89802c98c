"""Records with example pictures (MedPLIB-ICL) in their published forms, brought to one.

After the original's `ICLLazySupervisedDataset`, without its faults: a target never becomes an example, and what it cuts
away without a word (a fourth example, one without a mask) is an error.
"""

import re
from collections.abc import Callable
from typing import NoReturn

MAX_EXAMPLES = 3
EXAMPLES = "<examples>"  # in a question: where the examples are shown, in the words of the model's way of showing them
REQUEST = "Refer to the previous examples and segment the corresponding target in this image."
QUESTION = f"{EXAMPLES}Query: <image>\n{REQUEST}"
_NUMBERED = re.compile(r"image(\d+)")
_LISTS = ("icl_examples", "examples")
Fail = Callable[..., NoReturn]


def is_icl(raw: dict) -> bool:
    """Whether an unchecked record is of in-context learning: it lists examples, or numbers its pictures."""
    return any(name in raw for name in _LISTS) or any(map(_NUMBERED.fullmatch, raw))


def plain_form(raw: dict, fail: Fail) -> dict:
    """An ICL record with "image", "examples" as (image, mask) pairs, "target_mask", "structure" and "conversations".

    The published forms: `icl_examples` or `examples` as objects beside `image`, or image1, mask1, image2, ..., of which
    the last pair is the target unless there is an `image`. `target_mask` or `mask` is the target's mask. Without a
    conversation the record asks for the target in the original's words.
    """
    named = next((name for name in _LISTS if name in raw), None)
    pairs = _listed(raw[named], named, fail) if named else _numbered(raw, fail)
    image, target = raw.get("image"), raw.get("target_mask") or raw.get("mask")
    if image is None and not named:
        image, target = pairs.pop()
    if not _is_path(image):
        fail("image is not a path", "a path", repr(image))
    if target is not None and not _is_path(target):
        fail("target mask is not a path", "a path", repr(target))
    if not 1 <= len(pairs) <= MAX_EXAMPLES:
        what = "too many examples" if pairs else "no example"
        fail(what, f"1 to {MAX_EXAMPLES} pictures with their masks", str(len(pairs)))
    if (image, target) in pairs:
        fail("the target is its own example", "other pictures as examples", repr(image))
    turns = [_with_target(turn, target) for turn in raw.get("conversations") or []]
    if not turns:
        turns = [{"from": role, "value": text} for role, text in question_turns(target)]
    sought = {"examples": tuple(pairs), "target_mask": target, "structure": str(raw.get("structure") or "")}
    return raw | sought | {"image": image, "conversations": turns}


def _listed(found, name: str, fail: Fail) -> list[tuple[str, str]]:
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        fail(f"{name} is not a list of examples", 'objects with "image" and "mask"', repr(found)[:80])
    return [_pair(one.get("image"), one.get("mask"), f"{name}[{i}]", fail) for i, one in enumerate(found)]


def _numbered(raw: dict, fail: Fail) -> list[tuple[str, str]]:
    numbers = sorted(int(match[1]) for match in map(_NUMBERED.fullmatch, raw) if match)
    return [_pair(raw[f"image{i}"], raw.get(f"mask{i}"), f"image{i}", fail) for i in numbers]


def _pair(image, mask, name: str, fail: Fail) -> tuple[str, str]:
    if not _is_path(image):
        fail(f"{name}: image is not a path", "a path", repr(image))
    if mask is None:
        fail("example without a mask", f"the mask of {name}, {image}", "none")
    if not _is_path(mask):
        fail(f"{name}: mask is not a path", "a path", repr(mask))
    return image, mask


def _is_path(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _with_target(turn, target: str | None):
    """An answer that draws one mask without naming it draws the target's."""
    text = turn.get("value") if isinstance(turn, dict) and turn.get("from") == "gpt" else None
    if target is None or not isinstance(text, str) or text.count("<SEG>") != 1 or "<mask>" in text:
        return turn
    return turn | {"value": f"{text}<mask>{target}</mask>"}


def question_turns(target: str | None) -> tuple[tuple[str, str], ...]:
    """The conversation of a record that has none, in the original's words."""
    return ("human", QUESTION), ("gpt", "<SEG>" if target is None else f"<SEG><mask>{target}</mask>")
