"""Scores of captions by pycocoevalcap's programs in Java: SPICE (BiRD's RC task) and METEOR 1.5 (in its mBMR).

Where Java or pycocoevalcap is missing they raise MissingExtra, which says what to install.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medplib_jax.evaluate.metrics.captions import caption_words

# METEOR 1.5's parameters for English: of matches by form, stem, synonym and paraphrase, and of content words.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.2, 0.6, 0.75
STAGES = np.array([1.0, 0.6, 0.8, 0.6])
# What it counts of a pair: words and function words of both, matches of each stage, chunks, matched words of both.
METEOR_COUNTS = tuple(f"meteor_count_{i}" for i in range(4 + 4 * len(STAGES) + 3))


class MissingExtra(RuntimeError):
    """A metric needs something that is not installed; the message says what."""


def _package(metric: str) -> Path:
    """pycocoevalcap's folder. MissingExtra where it or Java is missing."""
    if shutil.which("java") is None:
        raise MissingExtra(
            f"{metric} is a Java program, and no `java` is on the PATH: install a Java runtime, or leave {metric} out"
        )
    try:
        import pycocoevalcap  # an extra  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingExtra(
            f"{metric} needs pycocoevalcap: pip install -e '.[caption]' in the repository's root, or leave {metric} out"
        ) from error
    return Path(next(iter(pycocoevalcap.__path__)))


def spice(answers: Sequence[str], truths: Sequence[str]) -> list[dict[str, float]]:
    """{"spice": SPICE (Anderson et al. 2016)} of each answer. It needs its parser's models, too."""
    _package("SPICE")
    from pycocoevalcap.spice.spice import Spice  # pyright: ignore[reportMissingImports]

    references = {i: [_one_line(truth)] for i, truth in enumerate(truths)}
    captions = {i: [_one_line(answer)] for i, answer in enumerate(answers)}
    try:
        _, scores = Spice().compute_score(references, captions)
    except Exception as error:  # a process that fails, a download that is refused
        raise MissingExtra(
            "SPICE did not run: it needs Java 8 and downloads the Stanford CoreNLP 3.6.0 models on its first use "
            f"(pycocoevalcap/spice/get_stanford_models.py); {type(error).__name__}: {error}"
        ) from error
    return [{"spice": float(score["All"]["f"])} for score in scores]


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def meteor_counts(answers: Sequence[str], truths: Sequence[str]) -> list[dict[str, float]]:
    """What METEOR 1.5 (Denkowski and Lavie 2014) counts of each answer, under METEOR_COUNTS; `meteor_of` makes a score
    of their sums.

    Words are those of protocol `reference`. A whole match has no chunks, so that sums are those of its own programs.
    """
    folder = _package("METEOR 1.5") / "meteor"
    pairs = zip(truths, answers, strict=True)
    asked = [" ||| ".join(["SCORE", *(" ".join(caption_words(text, "reference")) for text in pair)]) for pair in pairs]
    command = ["java", "-jar", "-Xmx2G", "meteor-1.5.jar", "-", "-", "-stdio", "-l", "en", "-norm"]
    done = subprocess.run(command, cwd=folder, input="\n".join([*asked, ""]), capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    if done.returncode or len(lines) != len(asked) or any(len(line) != len(METEOR_COUNTS) for line in lines):
        raise MissingExtra(f"METEOR 1.5 did not run: {_one_line(done.stderr)[-200:] or 'no scores came back'}")
    counts = np.array(lines, float).reshape(-1, len(METEOR_COUNTS))
    whole = (counts[:, -3] == 1) & (counts[:, -2] == counts[:, 0]) & (counts[:, -1] == counts[:, 1])
    counts[whole, -3] = 0
    return [dict(zip(METEOR_COUNTS, row, strict=True)) for row in counts.tolist()]


def meteor_of(counts: np.ndarray) -> np.ndarray:
    """METEOR 1.5 of sums [..., len(METEOR_COUNTS)] -> [...]; NaN without any words."""
    lengths, function = counts[..., :2], counts[..., 2:4]
    # matched content words and function words of answer and truth by stage
    matched = counts[..., 4:-3].reshape(*counts.shape[:-1], len(STAGES), 2, 2)
    weights = np.array([DELTA, 1 - DELTA])
    found = (STAGES[:, None] * np.einsum("...skt,k->...st", matched, weights)).sum(-2)
    words = DELTA * (lengths - function) + (1 - DELTA) * function
    chunks, covered = counts[..., -3], counts[..., -2:].mean(-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = np.moveaxis(found / words, -1, 0)
        mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
        score = mean * (1 - GAMMA * (chunks / covered) ** BETA)
    return np.where(lengths.sum(-1) > 0, np.nan_to_num(score), np.nan)
