"""Questions from sentences made here.

They say only what the masks prove; the same facts and generator give the same questions.

That a mask is missing proves nothing, unless the folder's masks are complete (`ImageFacts.absent`): "No" comes from
structures that lie elsewhere, are smaller, or are not the one in the region.
"""

from collections.abc import Sequence

import numpy as np

from medplib_jax.datasets.modalities import LABELS
from medplib_jax.datasets.qa.facts import ImageFacts, Target
from medplib_jax.datasets.qa.records import YES_NO, Turn, leaks

COMMON = ("ct", "mr", "x_ray", "ultrasound", "pet", "endoscopy", "dermoscopy", "fundus", "oct", "histopathology")
LISTED = 6  # names in one sentence
_SINGULAR_S = ("ss", "us", "is", "as")
_SINGULAR = ("lens", "pons", "biceps", "triceps")


def turns(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """All turns about one image, each once, those about the whole in random order; none gives its answer away."""
    made = [*sample(rng, vqa_turns(facts, rng)), *region_turns(facts, rng), *grounding_turns(facts, rng)]
    return [turn for turn in dict.fromkeys(made) if not leaks(turn)]


def sample(rng: np.random.Generator, items: Sequence, count: int | None = None) -> list:
    """Up to `count` of `items` (None: all) in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def pick(rng: np.random.Generator, items: Sequence):
    return items[int(rng.integers(len(items)))]


def verb(name: str) -> str:
    """ "is" or "are", by the name's ending."""
    last = name.split()[-1].lower()
    return "are" if last.endswith("s") and not last.endswith(_SINGULAR_S) and last not in _SINGULAR else "is"


def article(label: str) -> str:
    """A modality's label with its indefinite article, by its sound."""
    return f"{'an' if label[0] in 'aeiouOX' or label == 'MR' else 'a'} {label}"


def enumerate_names(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def share(area: float) -> str:
    """ "3 percent", "25 percent": whole percents below 10, then steps of 5."""
    percent = 100 * area
    return f"{round(percent) if percent < 10 else 5 * round(percent / 5)} percent"


def vqa_turns(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """Turns about the whole image.

    Its modality, what is there, a place, side or size for each name, and comparisons of names.
    """
    made = [*_modality(facts, rng), *_presence(facts, rng)]
    if 0 < len(facts.targets) <= LISTED:
        question = pick(
            rng, ("Which structures can be seen in this image?", "Name the structures that are visible in this image.")
        )
        made.append(Turn("vqa", question, enumerate_names([target.name for target in facts.targets])))
    for target in facts.targets:
        made += sample(rng, _single(target), 1)
    for pair in sample(rng, facts.pairs_apart(), len(facts.targets)):
        made += sample(rng, _comparisons(*sample(rng, pair), rng), 1)
    return made


def _modality(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """One question, because the answer to one gives the other away."""
    if not facts.label:
        return []
    if rng.random() < 0.5:
        return [
            Turn(
                "vqa",
                pick(rng, ("What imaging modality was used to take this image?", "What kind of image is this?")),
                facts.label,
            )
        ]
    other = pick(rng, [LABELS[prefix] for prefix in COMMON if prefix != facts.modality])
    return [
        _yes_no(f"Is this {article(facts.label)} image?", True)
        if rng.random() < 0.5
        else _yes_no(f"Is this {article(other)} image?", False)
    ]


def _yes_no(question: str, yes: bool, kind: str = "vqa") -> Turn:
    return Turn(kind, question, YES_NO[not yes], YES_NO)


def _presence(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """About as many names that are there as names that are not; nothing where nothing is known to be absent."""
    present = [target.name for target in facts.targets]
    count = min(len(present), len(facts.absent), 2)
    names = [(name, True) for name in sample(rng, present, count)] + [
        (name, False) for name in sample(rng, facts.absent, count)
    ]
    return [_yes_no(f"{verb(name).capitalize()} the {name} visible in this image?", yes) for name, yes in names]


def _single(target: Target) -> list[Turn]:
    """Questions about one name that its mask answers."""
    name, is_are, made = target.name, verb(target.name), []
    if target.is_compact and not target.has_side_word:
        made.append(Turn("vqa", f"In which part of the image {is_are} the {name}?", target.place))
        if abs(target.centre[0] - 0.5) > 0.1:
            side = "left" if target.centre[0] < 0.5 else "right"
            made.append(Turn("vqa", f"On which side of the image {is_are} the {name}?", side, ("left", "right")))
    if target.area >= 0.02:
        made.append(
            Turn(
                "vqa",
                f"About how much of the image {'does' if is_are == 'is' else 'do'} the {name} cover?",
                share(target.area),
            )
        )
    return made


def _comparisons(first: Target, second: Target, rng: np.random.Generator) -> list[Turn]:
    """Yes-or-no questions about two names that share no pixel; clear cases only."""
    start, made = f"{verb(first.name).capitalize()} the {first.name}", []
    if not (first.has_side_word or second.has_side_word):
        for axis, words in ((0, ("to the left of", "to the right of")), (1, ("above", "below"))):
            found = order(first, second, axis)
            if found is not None:
                asked = int(rng.integers(2))
                made.append(_yes_no(f"{start} {words[asked]} the {second.name} in this image?", asked == found))
    ratio = first.area / second.area
    if not 1 / 1.5 < ratio < 1.5:
        made.append(_yes_no(f"{start} larger than the {second.name} in this image?", ratio > 1))
    return made


def order(first: Target, second: Target, axis: int) -> int | None:
    """0 when the first one's box ends before the second one's begins, 1 the other way round.

    None when they overlap on this axis.
    """
    if first.box[axis + 2] <= second.box[axis]:
        return 0
    return 1 if second.box[axis + 2] <= first.box[axis] else None


def region_turns(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """Turns about regions.

    What each name's region is; whether it is one of two names, yes and no equally often; where one of the regions lies.
    """
    made = []
    for target in facts.targets:
        region = f"<region>{pick(rng, target.masks)}</region>"
        question = pick(
            rng,
            (
                f"What is the structure in {region}?",
                f"What does {region} show?",
                f"Which structure is marked by {region}?",
            ),
        )
        made.append(Turn("region", question, target.name, structure=target.name))
    for pair in sample(rng, facts.pairs_apart(), (len(facts.targets) + 1) // 2):
        shown, other = sample(rng, pair)
        yes = rng.random() < 0.5
        region = f"<region>{pick(rng, shown.masks)}</region>"
        made.append(_yes_no(f"Does {region} show the {(shown if yes else other).name}?", yes, "region"))
    compact = [target for target in facts.targets if target.is_compact]
    for target in sample(rng, compact, 1):
        made.append(
            Turn("region", f"In which part of the image does <region>{target.merged}</region> lie?", target.place)
        )
    return made


def grounding_turns(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """A mask of each name, one pair in one answer, and, where names are known to be absent, one that is not there."""
    made = [
        Turn(
            "grounding",
            _request(facts, rng, target.name),
            f"{_the(target.name)} <SEG>.<mask>{target.merged}</mask>",
            structure=target.name,
        )
        for target in facts.targets
    ]
    for first, second in sample(rng, facts.pairs_apart(), 1):
        answer = " and ".join(f"the {target.name} <SEG><mask>{target.merged}</mask>" for target in (first, second))
        made.append(
            Turn("grounding_pairs", _request(facts, rng, first.name, second.name), f"{answer[0].upper()}{answer[1:]}.")
        )
    return made + absent_turns(facts, rng)


def absent_turns(facts: ImageFacts, rng: np.random.Generator) -> list[Turn]:
    """A request for a mask of something that is known not to be there; none where nothing is."""
    return [
        Turn(
            "grounding",
            _request(facts, rng, name),
            f"The {name} {verb(name)} not visible in this image.",
            structure=name,
        )
        for name in sample(rng, facts.absent, 1)
    ]


def _the(name: str) -> str:
    return f"The {name} {verb(name)}"


def _request(facts: ImageFacts, rng: np.random.Generator, *names: str) -> str:
    wanted = enumerate_names([f"the {name}" for name in names])
    image = f"{facts.label} image" if facts.label else "image"
    return pick(
        rng,
        (
            f"Please segment {wanted} in this {image}.",
            f"Segment {wanted}.",
            f"Can you outline {wanted} in this {image}?",
        ),
    )
