"""Questions from a language model, in two steps: facts -> description, description -> questions.

The description with boxes is Med-GRIT's MIA, captions of structures its RC; VG and ROC need no words and come from
`grit`. What the model gets wrong is asked for again, then left out by name.
"""

import concurrent.futures
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.qa import grit, llm_answers, llm_prompts, template
from medplib_jax.datasets.qa.chat import Chat, EndpointError, Message, NoAnswer
from medplib_jax.datasets.qa.facts import ImageFacts, Target
from medplib_jax.datasets.qa.records import Written

ANSWERS = 3  # to one request, until one can be used
MOST_TARGETS = 8  # of one image, so that answers stay short
GIVE_UP = 10  # images in a row without any answer: nobody is there
T = TypeVar("T")


class LlmWriter:
    """Writes about images in their order, `concurrency` of them at a time.

    Prices are per million tokens, of questions and of answers.
    """

    def __init__(self, chat: Chat, seed: int, concurrency: int, prices: tuple[float, float] = (0.0, 0.0)):
        if concurrency < 1:
            raise ValueError(f"concurrency: expected at least 1, found {concurrency}")
        self._chat, self._seed, self._concurrency, self._prices = chat, seed, concurrency, prices

    def write(self, facts: Sequence[ImageFacts]) -> Iterator[Written]:
        """EndpointError when the endpoint answers nothing."""
        with concurrent.futures.ThreadPoolExecutor(self._concurrency) as pool:
            unanswered = 0
            try:
                for one, written in zip(facts, self._progress(pool.map(self._write, facts), len(facts)), strict=True):
                    unanswered = unanswered + 1 if isinstance(written, NoAnswer) else 0
                    if unanswered == GIVE_UP:
                        raise EndpointError(f"{GIVE_UP} images in a row were not answered; {written}")
                    yield _unanswered(one, written) if isinstance(written, NoAnswer) else written
            except BaseException:  # Ctrl-C, too: what is under way is finished and kept, nothing else is begun
                self._chat.stop()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def report(self) -> dict[str, Any]:
        """What was asked and paid; the cost when there are prices."""
        counts = self._chat.counts
        names = ("answers_paid", "answers_from_disk", "bad_answers", "prompt_tokens", "completion_tokens")
        report = {"writer": "llm", **{name: counts[name] for name in names}, "failed_tries": self._chat.failures()}
        cost = (counts["prompt_tokens"] * self._prices[0] + counts["completion_tokens"] * self._prices[1]) / 1e6
        return {**report, "cost": cost} if any(self._prices) else report

    def _write(self, facts: ImageFacts) -> Written | NoAnswer:
        """NoAnswer is given back, not raised, because `write` counts how many there are in a row."""
        try:
            return write_image(self._chat, facts, facts.generator(self._seed, "llm"))
        except NoAnswer as error:
            return error

    def _progress(self, results: Iterator[T], total: int) -> Iterator[T]:
        with tqdm(total=total, desc="language model", unit="image") as bar:
            for result in results:
                bar.update()
                counts = self._chat.counts
                bar.set_postfix(
                    tokens=counts["prompt_tokens"] + counts["completion_tokens"],
                    failed_tries=sum(self._chat.failures().values()),
                )
                yield result


def _unanswered(facts: ImageFacts, error: NoAnswer) -> Written:
    return Written(
        facts, problems=[DataError(facts.image, None, "the language model did not answer", "an answer", str(error))]
    )


def write_image(chat: Chat, facts: ImageFacts, rng: np.random.Generator) -> Written:
    """The turns about one image; those that could not be used are named."""
    if not facts.targets and not facts.label and not facts.metadata:
        return Written(
            facts, problems=[DataError(facts.image, None, "nothing to ask about", "a mask or a modality", "neither")]
        )
    targets = sorted(template.sample(rng, facts.targets, MOST_TARGETS), key=facts.targets.index)
    problems: list[DataError] = []
    description = _ask(
        chat,
        facts,
        llm_prompts.description_request(facts, targets),
        lambda text: llm_answers.parse_description(text, targets),
        problems,
    )
    if description is None:
        return Written(facts, problems=problems)
    request = llm_prompts.questions_request(llm_answers.plain(description), targets)
    questions = _ask(
        chat, facts, request, lambda text: llm_answers.parse_questions(text, facts, targets, rng), problems
    )
    if questions is None:
        return Written(facts, problems=problems)
    problems += [
        DataError(facts.image, None, what, "the form that was asked for", item) for what, item in questions.problems
    ]
    return Written(
        facts,
        questions.turns + template.absent_turns(facts, rng),
        _grit(facts, targets, description, questions.captions, rng),
        problems,
    )


def _ask(
    chat: Chat, facts: ImageFacts, messages: list[Message], parse: Callable[[str], T], problems: list[DataError]
) -> T | None:
    """The first answer that can be used; None, with the reason among the problems, when none can."""
    for _ in range(ANSWERS):
        text = chat.ask(messages)
        try:
            return parse(text)
        except llm_answers.BadAnswer as error:
            chat.count(bad_answers=1)
            messages, last = llm_prompts.again(messages, text, str(error)), error
    problems.append(
        DataError(facts.image, None, "no answer of the language model can be used", f"one in {ANSWERS}", str(last))
    )
    return None


def _grit(
    facts: ImageFacts, targets: Sequence[Target], description: str, captions: dict[str, str], rng: np.random.Generator
) -> dict[str, list[grit.Turn]]:
    if not targets:
        return {}
    return {
        "VG": [grit.find_turn(facts, target, rng) for target in targets],
        "ROC": [grit.name_turn(facts, target, rng) for target in targets],
        "RC": [
            (grit.caption_request(facts, target, rng), captions[target.name])
            for target in targets
            if target.name in captions
        ],
        "MIA": [(grit.analysis_request(rng), llm_answers.with_boxes(description, facts))],
    }
