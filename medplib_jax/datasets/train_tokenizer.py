"""Trains a small tokenizer on annotation files, for models that start from nothing (a converted model brings its own).

COMMAND
    python -m medplib_jax.datasets.train_tokenizer --sources data/mine/*.json --out data/mine_tokenizer
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence

from medplib_jax.data.prompts import TEMPLATES
from medplib_jax.data.records import MASK, REGION
from medplib_jax.data.sources import read_records
from medplib_jax.data.splits import may_hold_records
from medplib_jax.data.tokenizers import ADDED_TOKENS, Tokenizer, train_tokenizer

PIECES = 800
FRAME_REPEATS = 100  # so that the words around every question become whole tokens


def build_tokenizer(sources: Sequence[str], out: str, pieces: int = PIECES) -> Tokenizer:
    """A tokenizer for the words of these annotation files, saved in `out`.

    At most `pieces` SentencePiece pieces, fewer when the text does not hold enough, and the added tokens.
    """
    return train_tokenizer(training_text(sources), out, pieces)


def training_text(sources: Sequence[str]) -> Iterator[str]:
    """What the model will read: the template's sentences, and every turn without paths and tags.

    ValueError names a file of another form.
    """
    frames = [f"{sentence} USER: ASSISTANT:" for sentence in TEMPLATES.values()]
    yield from frames * FRAME_REPEATS
    for source in sources:
        if not may_hold_records(source):  # a manifest, which `*.json` names, too
            print(f"{source}: not a list of records, left out", file=sys.stderr)
            continue
        records = read_records(source)
        try:
            turns = [turn["value"] for record in records for turn in record["conversations"]]
        except (KeyError, TypeError) as error:
            expected = "a list of records with conversations of {from, value} turns"
            raise ValueError(f"{source}: expected {expected} ({error!r})") from error
        for turn in turns:
            yield re.sub(r"<[^<>]*>", " ", MASK.sub("", REGION.sub("", turn))).strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", nargs="+", required=True, help="annotation files in MeCoVQA form")
    parser.add_argument("--out", required=True, help="folder for tokenizer.model")
    parser.add_argument("--pieces", type=int, default=PIECES)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer(arguments.sources, arguments.out, arguments.pieces)
    size = tokenizer.vocab_size
    print(
        f"{arguments.out}: {size} tokens, {len(ADDED_TOKENS)} of them added; use --config.model.llm.vocab_size={size}"
    )


if __name__ == "__main__":
    main()
