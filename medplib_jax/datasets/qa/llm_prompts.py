"""What a language model is told about an image, and asked for: facts -> description, description -> questions.

The model sees words only: no picture, no file name, no coordinates. It names structures; paths and boxes are put in by
`llm_answers`.
"""

from collections.abc import Sequence

from medplib_jax.datasets.qa.chat import Message
from medplib_jax.datasets.qa.facts import ImageFacts, Target
from medplib_jax.datasets.qa.template import order, share, verb

_RULES = """You help to make a dataset of questions about medical images. You cannot see the image: use only what is \
stated, and add no \
finding, diagnosis, cause or advice. Write plain, correct English in several wordings. "left", "right", "upper" and \
"lower" are sides of \
the image; "left" and "right" inside a structure's name are the patient's. Write as someone who looks at the image: \
never mention facts, \
descriptions, lists, masks, contours or segmentations. Answer with one JSON object and nothing else."""

_DESCRIBE = """Describe the image in 2 to 6 sentences: its modality, the structures, where they lie, how large they \
are, and how they lie to \
each other, as far as it is stated. Put the first mention of each structure into <ref> and </ref>, with its name as it \
is stated: \
"<ref>the liver</ref>".

{"description": "..."}

What is known:
"""

_ASK = """Write questions and answers about the image that is described below.

- "vqa": %d about the whole image. Mix short and reasoned answers, and yes-or-no questions with both answers; \
"choices" lists the answers to \
choose from ("Yes" and "No", or up to six), and is empty for a free answer. The answer is one of the choices then.
- "region": one for each of the structures, about a part of the image that the reader has marked; <region> stands in \
the question for that \
part, once. The question does not name the structure. "choices" as above.
- "grounding": one for each of the structures, that asks for its outline; the answer is a sentence with <SEG> after \
the name. At most one more \
names two structures and has <SEG> after each, in the order of "names".
- "captions": for each of the structures one or two sentences that describe it.

{"vqa": [{"question": "...", "answer": "...", "choices": []}],
 "region": [{"name": "...", "question": "... <region> ...", "answer": "...", "choices": []}],
 "grounding": [{"names": ["..."], "question": "...", "answer": "The ... is <SEG>."}],
 "captions": [{"name": "...", "caption": "..."}]}

A question must not contain its answer, unless it offers all choices. Structures, with their names exactly as they \
must be given: %s

The image:
%s"""

_OWN = ("modality", "patient", "spacing")  # of the metadata: said in other words, nobody's business, not to be seen
_AGAIN = "This cannot be used: %s. Give the whole JSON object again, corrected, and nothing else."


def description_request(facts: ImageFacts, targets: Sequence[Target]) -> list[Message]:
    """Asks for {"description"} of the image, these structures of it."""
    return _messages(_DESCRIBE + "\n".join(known(facts, targets)))


def questions_request(description: str, targets: Sequence[Target]) -> list[Message]:
    """Asks for {"vqa", "region", "grounding", "captions"} about the image of this description."""
    names = ", ".join(f'"{target.name}"' for target in targets) or "none; leave the lists about structures empty"
    return _messages(_ASK % (max(3, min(6, 2 + len(targets))), names, description))


def again(messages: Sequence[Message], answer: str, complaint: str) -> list[Message]:
    """The same request after an answer that could not be used."""
    return [*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": _AGAIN % complaint}]


def _messages(text: str) -> list[Message]:
    return [{"role": "system", "content": _RULES}, {"role": "user", "content": text}]


def known(facts: ImageFacts, targets: Sequence[Target]) -> list[str]:
    """All that masks and metadata prove, a line each."""
    lines = [f"- Modality: {facts.label or 'not known'}"]
    lines += [f"- {key}: {value}" for key, value in sorted(facts.metadata.items()) if key not in _OWN and value.strip()]
    lines += [_structure(target) for target in targets]
    lines += [
        line
        for first, second in facts.pairs_apart()
        if first in targets and second in targets
        for line in _relation(first, second)
    ]
    if facts.absent:
        lines.append(f"- Certainly not in the image: {', '.join(facts.absent)}")
    return lines if targets else [*lines, "- No structure is known."]


def _structure(target: Target) -> str:
    place = f"in the {target.place} of the image" if target.is_compact else "over much of the image"
    parts = f", in {len(target.masks)} separate parts" if len(target.masks) > 1 else ""
    size = share(target.area) if target.area >= 0.01 else "less than 1 percent"
    return f"- {target.name}: {place}, {size} of the image{parts}"


def _relation(first: Target, second: Target) -> list[str]:
    """Clear cases only."""
    sides = [
        (words, order(first, second, axis))
        for axis, words in enumerate((("to the left of", "to the right of"), ("above", "below")))
    ]
    words = [words[side] for words, side in sides if side is not None]
    return [f"- The {first.name} {verb(first.name)} {' and '.join(words)} the {second.name}."] if words else []
