"""BiRD's four scores of recorded responses, beside those that its own scripts gave (protocol `reference`)."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np

from medplib_jax.data.chatml import extract_answer
from medplib_jax.data.records import PICTURE, modality
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.kinds import Answer
from medplib_jax.evaluate.kinds.refer_box import KINDS
from medplib_jax.evaluate.metrics.captions import BLEU_COUNTS, ORDERS, caption_words, corpus_bleu
from tests.convert.checks import Row, relative

MAIN = {"VG": "recall_at_0.5", "ROC": "roc_accuracy"}
CAPTIONS = {"Bleu_1": "bleu_1", "Bleu_2": "bleu_2", "Bleu_3": "bleu_3", "Bleu_4": "bleu_4", "ROUGE_L": "rouge_l"}
TASKS = {kind.part: kind for kind in KINDS}
DIGITS = 1e-6  # the scripts round to six


def check_scores(cases: dict) -> Iterator[Row]:
    """Everything but CIDEr and SPICE; METEOR and mBMR where METEOR 1.5 is (see `evaluate/metrics/programs.py`)."""
    for raw, expected in cases["extract_information"]:
        yield Row("texts of raw responses", float(extract_answer(raw) != expected), 0.0)
    for text, expected in cases["ptb_tokenize"]:
        yield Row("words of captions", float(" ".join(caption_words(text, "reference")) != expected), 0.0)
    for task in TASKS:
        yield from check_task(task, cases[task])
    alone = cases["edge"]["VG_one_modality_only"]
    found = scored("VG", [("ct_0.png", alone["processed"][0], "<box>(1,2),(3,4)</box>")])
    yield Row("VG", abs(found["recall_at_0.5/modality_mean"] - alone["mean"]), DIGITS)
    yield from check_sentences(cases["caption_scores"])


def check_task(task: str, case: dict) -> Iterator[Row]:
    """One task's responses: their texts, the scores by modality and the mean of the eight."""
    for item, expected in zip(case["items"], case["processed"], strict=True):
        yield Row("texts of raw responses", float(extract_answer(item["response"]) != expected), 0.0)
    found = scored(task, [(item["image"], item["response"], item["annotation"]) for item in case["items"]])
    names = {MAIN[task]: None} if task in MAIN else {ours: theirs for theirs, ours in CAPTIONS.items()}
    if "mBMR_1.5" in found:
        names["meteor_1.5"] = "METEOR"
        yield Row(f"{task} mBMR", abs(found["mBMR_1.5/modality_mean"] - case["mBMR"]), DIGITS)
    for ours, theirs in names.items():
        for name, value in case["modality"].items():
            own = found.get(f"{ours}/{modality(name)}", 0.0)
            yield Row(f"{task} by modality", abs(own - (value[theirs] if theirs else value)), DIGITS)
        mean = case["mean"][theirs] if theirs else case["mean"]
        yield Row(f"{task} mean", abs(found[f"{ours}/modality_mean"] - mean), DIGITS)


def scored(task: str, items: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """{metric: value} of (image, response, annotation), as a sweep scores and sums them."""
    answers = [Answer(extract_answer(response), annotation, "") for _, response, annotation in items]
    rows = [
        TASKS[task].score(answer, "reference") | {"answer": answer.text, "expected": answer.expected}
        for answer in answers
    ]
    if task not in MAIN:
        with contextlib.suppress(metrics.MissingExtra):
            counts = metrics.meteor_counts([answer.text for answer in answers], [answer.expected for answer in answers])
            rows = [row | {"scores": row["scores"] | more} for row, more in zip(rows, counts, strict=True)]
    return metrics.by_modality(metrics.statistics(rows, "reference"), [modality(image) for image, _, _ in items])


def check_responses(cases: dict) -> Iterator[Row]:
    """VG and ROC of the over-fitted model's raw responses, of four modalities."""
    for task, case in cases["metrics_raw_responses"].items():
        asked = [item for item in cases["items"] if item["task"] == task]
        images = [PICTURE.findall(item["question"])[0] for item in asked]
        items = [(image, item["raw_response"], item["annotation"]) for image, item in zip(images, asked, strict=True)]
        found = scored(task, items)
        yield Row(f"{task} of raw responses", abs(found[f"{MAIN[task]}/modality_mean"] - case["mean"]), DIGITS)


def check_sentences(case: dict) -> Iterator[Row]:
    """BLEU and ROUGE-L of single sentences and of all."""
    scores = [metrics.mia_scores(case["res"][i][0], case["gts"][i][0], "reference") for i in case["gts"]]
    counts = np.array([[score[name] for name in BLEU_COUNTS] for score in scores], float)
    for order, corpus, each in zip(ORDERS, case["Bleu"], case["Bleu_each"], strict=True):
        yield Row("BLEU of sentences", relative(corpus_bleu(counts, order), each), DIGITS)
        yield Row("BLEU of all sentences", abs(float(corpus_bleu(counts.sum(0), order)) - corpus), DIGITS)
    yield Row("ROUGE-L of sentences", relative([score["rouge_l"] for score in scores], case["ROUGE_L_each"]), DIGITS)
