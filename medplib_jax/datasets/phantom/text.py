"""Questions and answers about a phantom image, as records of MeCoVQA's on-disk form.

A training record is one conversation of several turns about one image. No name is asked about twice in it, so that a
model must look: an earlier answer does not give a later one away. A test record is one question. Answers are short and
come from a closed vocabulary.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class SceneTarget:
    """One visible name: files of its single instances and of their union, centre x of the union in [0, 1]."""

    name: str
    finding: bool
    masks: tuple[str, ...]
    merged: str
    centre_x: float


@dataclasses.dataclass(frozen=True)
class SceneFacts:
    """What is true of one image. `absent` holds (name, is finding) of the same modality's other names."""

    image: str
    modality: str
    targets: tuple[SceneTarget, ...]
    absent: tuple[tuple[str, bool], ...]

    @property
    def findings(self):
        return [target for target in self.targets if target.finding]


def article(word):
    """`word` with its indefinite article; abbreviations by their sound."""
    return f"{'an' if word[0] in 'aeioX' or word in ('MR', 'ultrasound', 'ulcer') else 'a'} {word}"


def plural(name):
    return name + "s"


def _pick(rng, items):
    return items[int(rng.integers(len(items)))]


def sample(rng, items, count=None):
    """Up to `count` of `items` (None: all) in random order."""
    return [items[i] for i in rng.permutation(len(items))[:count]]


def report(facts, rng):
    """A structured report: the modality and each of its names in random order.

    "CT: liver present, cyst absent, spine present".
    """
    statements = [present(target.name) for target in facts.targets] + [absent(name) for name, _ in facts.absent]
    return f"{facts.modality}: {', '.join(sample(rng, statements))}"


def align_turns(facts, rng):
    """The describing turn of stage I."""
    return [(_pick(rng, ("Describe this image.", "What does this image show?")), report(facts, rng), "open")]


def modality_turns(facts, rng, labels):
    """A closed question about the modality, balanced, and an open one."""
    same = rng.random() < 0.5
    asked = facts.modality if same else _pick(rng, [label for label in labels if label != facts.modality])
    return [
        (f"Is this {article(asked)} image?", "Yes" if same else "No", "closed"),
        (
            _pick(rng, ("What imaging modality was used to take this image?", "What modality is this?")),
            facts.modality,
            "open",
        ),
    ]


def presence_turn(facts, rng, finding):
    """(name, turn) asking whether one name is visible: yes or no by a fair coin where both are possible."""
    present = [target.name for target in facts.targets if target.finding == finding]
    absent = [name for name, is_finding in facts.absent if is_finding == finding]
    yes = bool(present) and (not absent or rng.random() < 0.5)
    name = _pick(rng, present if yes else absent)
    return name, _presence(rng, name, finding, yes)


def _presence(rng, name, finding, yes):
    """Question and answer about one name, in the style of a short report."""
    direct = f"Is there {article(name)} in this image?" if finding else f"Is the {name} visible in this image?"
    question = _pick(rng, (direct, f"Please look for the {name}."))
    return question, present(name) if yes else absent(name), "closed"


def present(name):
    return f"{name} present"


def absent(name):
    """What is said of a name that is not in the image, also when its mask was asked for.

    Every answer about a name begins with it, so that a model that starts from nothing decides at the name itself what
    follows.
    """
    return f"{name} absent"


def more_presence_turns(facts, rng, asked, kinds, count):
    """Up to `count` of (name, turn) about names not `asked` about yet.

    Yes and no by a fair coin for as long as there are both.
    """
    present = sample(
        rng,
        [
            (target.name, target.finding)
            for target in facts.targets
            if target.name not in asked and target.finding in kinds
        ],
    )
    absent = sample(rng, [entry for entry in facts.absent if entry[0] not in asked and entry[1] in kinds])
    turns = []
    while len(turns) < count and present and absent:
        yes = rng.random() < 0.5
        name, finding = (present if yes else absent).pop()
        turns.append((name, _presence(rng, name, finding, yes)))
    return turns


def count_turn(target):
    return f"How many {plural(target.name)} are there?", str(len(target.masks)), "open"


def side_turn(target):
    """Left or right of the image."""
    return f"On which side of the image is the {target.name}?", "left" if target.centre_x < 0.5 else "right", "open"


def normality_turn(facts):
    return "Is this image normal or abnormal?", "abnormal" if facts.findings else "normal", "closed"


def place_turns(rng, targets):
    """At most one question about how many or where, single and double things about equally often."""
    countable = [target for target in targets if len(target.masks) > 1 or (target.finding and rng.random() < 0.5)]
    if countable:
        return [count_turn(_pick(rng, countable))]
    aside = [target for target in targets if len(target.masks) == 1 and abs(target.centre_x - 0.5) > 0.1]
    aside = [target for target in aside if target.finding] or aside
    return [side_turn(_pick(rng, aside))] if aside else []


def complex_turns(facts, rng, labels, more_presence):
    """Questions about the whole image, in random order, with up to `more_presence` beyond the usual two about presence.

    Normality (balanced: half of the normal images, a fifth of the others) is never asked beside a finding.
    """
    closed, open_ = modality_turns(facts, rng, labels)
    normality = rng.random() < (0.214 if facts.findings else 0.5)
    named, turns = set(), []
    kinds = [False] if normality else [False, True]
    for finding in kinds:
        if finding or any(not is_finding for _, is_finding in facts.absent):
            name, turn = presence_turn(facts, rng, finding)
            named.add(name)
            turns.append(turn)
    for name, turn in more_presence_turns(facts, rng, named, kinds, more_presence):
        named.add(name)
        turns.append(turn)
    turns += place_turns(
        rng, [target for target in facts.targets if target.name not in named and target.finding in kinds]
    )
    if normality:
        turns.append(normality_turn(facts))
    turns.append(closed)
    turns = sample(rng, turns)
    turns.insert(
        int(rng.integers(turns.index(closed) + 1, len(turns) + 1)), open_
    )  # never before the closed one, whose answer it gives away
    return turns


def region_turns(facts, rng):
    """Whether one region is normal (half of them are) and what up to three others are."""
    ordered = sample(rng, facts.targets)
    finding_first = rng.random() < 0.7  # not a half: three images in ten have no finding
    ordered.sort(key=lambda target: target.finding != finding_first)
    turns = []
    for number, target in enumerate(ordered[:4]):
        region = f"<region>{_pick(rng, target.masks)}</region>"
        if number == 0:
            turns.append((f"Is {region} normal or abnormal?", "abnormal" if target.finding else "normal", "closed"))
        else:
            turns.append(
                (_pick(rng, (f"What is {region}?", f"What is the structure in {region}?")), target.name, "open")
            )
    return sample(rng, turns)


def _request(rng, facts, *names):
    wanted = " and ".join(f"the {name}" for name in names)
    verb = "is" if len(names) == 1 else "are"
    return _pick(
        rng,
        (
            f"Please segment {wanted} in this {facts.modality} image.",
            f"Please segment {wanted}.",
            f"Where {verb} {wanted}?",
        ),
    )


def single_turn(facts, rng, target):
    return _request(rng, facts, target.name), f"{target.name} <SEG><mask>{target.merged}</mask>", "open"


def double_turn(facts, rng, first, second):
    answer = f"{first.name} <SEG><mask>{first.merged}</mask> and {second.name} <SEG><mask>{second.merged}</mask>"
    return _request(rng, facts, first.name, second.name), answer, "open"


def absent_turn(facts, rng, name):
    return _request(rng, facts, name), absent(name), "open"


def _absent_names(facts, rng, count):
    """Up to `count` names that are not visible, structures and findings equally often first."""
    names = sample(rng, facts.absent)
    half = rng.random() < 0.5
    return [name for name, _ in sorted(names, key=lambda entry: entry[1] != half)[:count]]


def grounding_turns(facts, rng):
    """Requests for masks, at most 4.

    Up to two single targets, often one pair in one answer, two names that are not there. With fewer absent names a
    model draws what is usually there.
    """
    targets = sample(rng, facts.targets)
    turns = []
    if len(targets) > 2 and rng.random() < 0.6 or len(targets) == 2 and rng.random() < 0.3:
        first, second, *targets = targets
        turns.append(double_turn(facts, rng, first, second))
    turns += [single_turn(facts, rng, target) for target in targets[:2]]
    turns += [absent_turn(facts, rng, name) for name in _absent_names(facts, rng, 2)]
    return sample(rng, turns)


def conversation(facts, turns):
    """One multi-turn training record."""
    messages = []
    for question, answer, _ in turns:
        messages.append({"from": "human", "value": question if messages else f"<image>\n{question}"})
        messages.append({"from": "gpt", "value": answer})
    return {"image": facts.image, "conversations": messages}


def single_records(facts, turns):
    """Test records, one per turn, with `answer_type`."""
    return [{**conversation(facts, [turn]), "answer_type": turn[2]} for turn in turns]
