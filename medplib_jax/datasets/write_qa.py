"""Writes questions and answers about a folder of images with named masks.

VQA, region VQA, grounding, refer-and-ground conversations.

COMMAND
    python -m medplib_jax.datasets.write_qa --pairs data/mine --out data/mine_qa --writer template
    python -m medplib_jax.datasets.write_qa --pairs data/mine --out data/mine_qa --writer llm \\
        --endpoint http://localhost:8000/v1 --model NAME
    python -m medplib_jax.datasets.train_tokenizer --sources data/mine_qa/train/*.json --out runs/mine/tokenizer
    python -m medplib_jax.train --config=configs/finetune_folder.py:data/mine_qa ...

The folder: images/, masks/<image>/<name>.png, and if you like metadata.json (see `qa.folder`). The result is a dataset
in MeCoVQA's form (images/, masks/, train/, test/) with Med-GRIT's conversations beside it (grit/train, grit/test),
manifest.json and skipped.jsonl. `template` needs no network; the same folder and seed give the same files. `llm` asks a
language model twice for each image: for a description of what masks and metadata.json prove, and for questions about
that description; it is shown no picture, file name or patient. Its answers are kept in OUT/answers: the same command
again continues an interrupted run and pays for no answer twice. What it gets wrong is asked again, then left out by
name; the manifest says what was asked and paid. All images of one patient or volume, where metadata.json or file names
tell it, are in one split.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from medplib_jax.data.errors import DataError, Notice
from medplib_jax.datasets.command import add_workers, finish, parse, window, workers_of
from medplib_jax.datasets.files import Folder
from medplib_jax.datasets.patients import check_pattern, split_of
from medplib_jax.datasets.processes import CORES, Workers
from medplib_jax.datasets.qa import grit, records, template
from medplib_jax.datasets.qa.facts import ImageFacts
from medplib_jax.datasets.qa.folder import read_all, scan

KEY = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class QaOptions:
    """What is asked, and how it is split.

    seed: of the sentences. test_share: of the patients. complete: a name of the modality without a mask is not in the
    image. window: (centre, width) in which pictures of 16 bits are shown. patient: see `patients.patient_of`.
    """

    seed: int = 0
    test_share: float = 0.1
    complete: bool = False
    window: tuple[float, float] | None = None
    patient: str = ""

    def __post_init__(self):
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test share: expected a number in [0, 1], found {self.test_share}")
        check_pattern(self.patient)


def write_qa(
    pairs: str, out: str, writer: records.Writer, options: QaOptions, workers: Workers = CORES
) -> dict[str, Any]:
    """Makes the dataset `out` of the folder `pairs`; returns its manifest. DataError when the folder has no image.

    An image, mask or question that cannot be used is named in skipped.jsonl, and so are files that belong to no image.
    """
    found, problems = scan(pairs, options.patient)
    with Folder(out, "write_qa", pairs) as folder:
        facts = []
        for one, errors in read_all(found, folder, options.complete, options.window, workers):
            problems += errors
            facts += [one] if one else []
        files: dict[str, list] = {}
        for written in writer.write(facts):
            problems += written.problems
            for name, new in _records(written, options.test_share).items():
                files.setdefault(name, []).extend(new)
        files = {name: made for name, made in sorted(files.items()) if made}
        for name, made in files.items():
            folder.write_json(name, made)
        manifest = {
            **dataclasses.asdict(options),
            "images": len(facts),
            "patients": len({one.patient for one in facts}),
            "masks": sum(len(target.masks) for one in facts for target in one.targets),
            "modalities": dict(sorted(Counter(one.modality for one in facts).items())),
            **folder.write_problems(problems),
            **writer.report(),
            "records": {name: len(made) for name, made in files.items()},
            "notices": [*_split_notices(facts, options), *_noted(problems)],
        }
        folder.write_json("manifest.json", manifest)
    return manifest


def _records(written: records.Written, test_share: float) -> dict[str, list[dict[str, Any]]]:
    """The records about one image by the file that they belong to."""
    one = written.facts
    split = split_of(one.patient, test_share)
    made = (records.test_records if split == "test" else records.training_records)(one, written.turns)
    files = {f"{split}/{kind}.json": new for kind, new in made.items()}
    grit_files = {
        f"grit/{split}/{task}.json": [grit.record(one, turn) for turn in turns] for task, turns in written.grit.items()
    }
    return files | grit_files


def _split_notices(facts: Sequence[ImageFacts], options: QaOptions) -> list[str]:
    """What to say when one of the splits is empty although it was asked for."""
    patients = {one.patient for one in facts}
    tested = sum(split_of(patient, options.test_share) == "test" for patient in patients)
    empty = [
        name
        for name, count, wanted in (
            ("test", tested, options.test_share > 0),
            ("training", len(patients) - tested, options.test_share < 1),
        )
        if wanted and not count
    ]
    return [
        f"no {name} split: none of {len(patients)} patients falls into it at a test share of {options.test_share:g};"
        " choose another --test-share, add patients, or say with --patient REGEX how to tell them apart"
        for name in empty
    ]


def _noted(problems: Sequence[DataError]) -> list[str]:
    """What was noted about files that are used: an example of each, and how many more there are."""
    noted: dict[str, list[DataError]] = {}
    for problem in problems:
        if isinstance(problem, Notice):
            noted.setdefault(problem.what, []).append(problem)
    return [f"{some[0]}" + (f" (and {len(some) - 1} more)" if len(some) > 1 else "") for some in noted.values()]


class TemplateWriter:
    """Turns from `template` and `grit`; an image about which nothing can be asked is named."""

    def __init__(self, seed: int):
        self._seed = seed

    def write(self, facts: Sequence[ImageFacts]) -> Iterator[records.Written]:
        for one in facts:
            turns = template.turns(one, one.generator(self._seed, "template"))
            problems = (
                [] if turns else [DataError(one.image, None, "nothing to ask about", "a mask or a modality", "neither")]
            )
            yield records.Written(one, turns, grit.turns(one, one.generator(self._seed, "grit")), problems)

    def report(self) -> dict[str, Any]:
        return {"writer": "template"}


def _llm_writer(arguments: argparse.Namespace) -> records.Writer:
    """ValueError when the arguments do not name an endpoint."""
    from medplib_jax.datasets.qa import chat, llm  # only who asks a model needs them

    endpoint = chat.Endpoint(
        arguments.endpoint, arguments.model, os.environ.get(KEY, ""), json.loads(arguments.request), arguments.timeout
    )
    cache = arguments.cache or os.path.join(arguments.out, "answers")
    asked = chat.Chat(endpoint, cache)
    if not os.path.isdir(cache):  # later runs may find all answers there
        asked.reach()
    return llm.LlmWriter(asked, arguments.seed, arguments.concurrency, (arguments.price_in, arguments.price_out))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="folder with images/ and masks/<image>/<name>.png")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--writer", choices=("template", "llm"), default="template")
    parser.add_argument("--seed", type=int, default=QaOptions.seed)
    parser.add_argument(
        "--test-share",
        type=float,
        default=QaOptions.test_share,
        help="share of the patients whose questions are kept for testing",
    )
    parser.add_argument(
        "--complete",
        action="store_true",
        help="masks are complete: a name of the modality without a mask is not in the image",
    )
    parser.add_argument("--window", type=window, help="centre,width of the grey that pictures of 16 bits are shown in")
    parser.add_argument(
        "--patient", default="", metavar="REGEX", help="finds the patient in an image's path below images/"
    )
    add_workers(parser)
    llm = parser.add_argument_group(
        "--writer llm",
        f"asks an OpenAI-compatible chat API; the key comes from {KEY} in the environment, where one is needed",
    )
    llm.add_argument("--endpoint", default="", help="address up to the version, such as http://localhost:8000/v1")
    llm.add_argument("--model", default="", help="the model's name there")
    llm.add_argument("--concurrency", type=int, default=8, help="images at a time")
    llm.add_argument("--timeout", type=float, default=300.0, help="seconds for one answer")
    llm.add_argument(
        "--request",
        default="{}",
        help='further fields of every request, JSON: \'{"temperature": 0.7, "max_tokens": 2000}\'',
    )
    llm.add_argument("--cache", default="", help="folder of the answers; OUT/answers by default")
    llm.add_argument(
        "--price-in", type=float, default=0.0, help="of a million tokens of questions, for the cost in the manifest"
    )
    llm.add_argument("--price-out", type=float, default=0.0, help="of a million tokens of answers")
    arguments = parse(parser)

    def make() -> dict[str, Any]:
        options = QaOptions(
            arguments.seed, arguments.test_share, arguments.complete, arguments.window, arguments.patient
        )
        writer = _llm_writer(arguments) if arguments.writer == "llm" else TemplateWriter(options.seed)
        return write_qa(arguments.pairs, arguments.out, writer, options, workers_of(arguments))

    return finish(make)


if __name__ == "__main__":
    sys.exit(main())
