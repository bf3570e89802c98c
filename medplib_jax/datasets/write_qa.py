"""Writes questions and answers about a folder of images with named masks: VQA, region VQA, grounding, refer-and-ground conversations.

COMMAND
    python -m medplib_jax.datasets.write_qa --pairs data/mine --out data/mine_qa --writer template
    python -m medplib_jax.datasets.write_qa --pairs data/mine --out data/mine_qa --writer llm --endpoint http://localhost:8000/v1 --model NAME
    python -m medplib_jax.datasets.train_tokenizer --sources data/mine_qa/train/*.json --out runs/mine/tokenizer
    python -m medplib_jax.train --config=configs/finetune_folder.py:data/mine_qa ...

The folder: images/, masks/<image>/<name>.png, and if you like metadata.json (see `qa.folder`). The result is a dataset in MeCoVQA's form
(images/, masks/, train/, test/) with Med-GRIT's conversations beside it (grit/train, grit/test), manifest.json and skipped.jsonl.
`template` needs no network; the same folder and seed give the same files. `llm` asks a language model twice for each image: for a description
of what masks and metadata.json prove, and for questions about that description; it is shown no picture, file name or patient. Its answers are
kept in OUT/answers: the same command again continues an interrupted run and pays for no answer twice. What it gets wrong is asked again, then
left out by name; the manifest says what was asked and paid. All images of one patient or volume, where metadata.json or file names tell it,
are in one split.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from medplib_jax.data.errors import DataError
from medplib_jax.datasets.command import finish
from medplib_jax.datasets.mecovqa import write_json
from medplib_jax.datasets.processes import make_pool
from medplib_jax.datasets.qa import grit, records, template
from medplib_jax.datasets.qa.facts import Facts
from medplib_jax.datasets.qa.folder import Pair, read_facts, scan, vocabulary

VERSION = 2  # raise it when the same arguments give other files
_IN_PROCESS = 64  # fewer images are not worth starting processes for
KEY = "OPENAI_API_KEY"


@dataclasses.dataclass(frozen=True)
class Options:
    """seed: of the sentences. test_share: of the images. complete: a name of the modality without a mask is not in the image."""

    seed: int = 0
    test_share: float = 0.1
    complete: bool = False

    def __post_init__(self):
        if not 0 <= self.test_share <= 1:
            raise ValueError(f"test share: expected a number in [0, 1], found {self.test_share}")


def write_qa(pairs: str, out: str, writer: records.Writer, options: Options) -> dict[str, Any]:
    """Makes the dataset `out` of the folder `pairs`; returns its manifest. DataError when the folder has no image.

    An image, mask or question that cannot be used is named in skipped.jsonl.
    """
    found, problems = scan(pairs)
    facts = []
    for one, errors in _read_all(found, out, options.complete):
        problems += errors
        facts += [one] if one else []
    by_file, by_task = {}, {}
    for written in writer.write(facts):
        one = written.facts
        problems += written.problems
        split = "test" if _fraction(one.group) < options.test_share else "train"
        made = (records.test_records if split == "test" else records.training_records)(one, written.turns)
        for kind, new in made.items():
            by_file.setdefault(f"{split}/{kind}.json", []).extend(new)
        for task, turns in written.grit.items():
            by_task.setdefault(f"grit/{split}/{task}.json", []).extend(grit.record(one, turn) for turn in turns)
    manifest = {
        "version": VERSION,
        **dataclasses.asdict(options),
        "images": len(facts),
        "masks": sum(len(target.masks) for one in facts for target in one.targets),
        "modalities": dict(sorted(Counter(one.modality for one in facts).items())),
        "skipped": len(problems),
        "reasons": dict(Counter(problem.what for problem in problems).most_common()),
        **writer.report(),
        "records": {name: len(made) for name, made in sorted({**by_file, **by_task}.items())},
    }
    _save(out, {**by_file, **by_task}, problems, manifest)
    return manifest


def _save(out: str, files: dict[str, list], problems: Sequence[DataError], manifest: dict[str, Any]) -> None:
    for split in ("train", "test"):  # of an earlier run, whose split may have been another one
        for name in (
            *(f"{split}/{kind}.json" for kind in records.KINDS),
            *(f"grit/{split}/{task}.json" for task in grit.TASKS),
        ):
            Path(out, name).unlink(missing_ok=True)
    for name, made in files.items():
        if made:
            write_json(os.path.join(out, name), made)
    with open(os.path.join(out, "skipped.jsonl"), "w", encoding="utf-8") as file:
        file.writelines(json.dumps(problem.as_dict()) + "\n" for problem in problems)
    write_json(os.path.join(out, "manifest.json"), manifest)


def _read_all(pairs: Sequence[Pair], out: str, complete: bool) -> Iterator[tuple[Facts | None, list[DataError]]]:
    names = vocabulary(pairs) if complete else {}
    jobs = [(pair, tuple(name for name in names.get(pair.modality, ()) if name not in pair.names)) for pair in pairs]
    read = functools.partial(_read, out)
    progress = functools.partial(tqdm, total=len(jobs), desc="masks", unit="image")
    if len(jobs) < _IN_PROCESS:
        yield from progress(map(read, jobs))
        return
    with make_pool() as pool:
        yield from progress(pool.map(read, jobs, chunksize=8))


def _read(out: str, job: tuple[Pair, tuple[str, ...]]) -> tuple[Facts | None, list[DataError]]:
    try:
        return read_facts(job[0], out, job[1])
    except DataError as error:
        return None, [error]


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


class TemplateWriter:
    """Turns from `template` and `grit`; an image about which nothing can be asked is named."""

    def __init__(self, seed: int):
        self._seed = seed

    def write(self, facts: Sequence[Facts]) -> Iterator[records.Written]:
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
    return llm.Writer(
        chat.Chat(endpoint, cache), arguments.seed, arguments.concurrency, (arguments.price_in, arguments.price_out)
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", required=True, help="folder with images/ and masks/<image>/<name>.png")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--writer", choices=("template", "llm"), default="template")
    parser.add_argument("--seed", type=int, default=Options.seed)
    parser.add_argument(
        "--test-share",
        type=float,
        default=Options.test_share,
        help="share of the images whose questions are kept for testing",
    )
    parser.add_argument(
        "--complete",
        action="store_true",
        help="masks are complete: a name of the modality without a mask is not in the image",
    )
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
    arguments = parser.parse_args()

    def make() -> dict[str, Any]:
        options = Options(arguments.seed, arguments.test_share, arguments.complete)
        writer = _llm_writer(arguments) if arguments.writer == "llm" else TemplateWriter(options.seed)
        return write_qa(arguments.pairs, arguments.out, writer, options)

    return finish(make)


if __name__ == "__main__":
    sys.exit(main())
