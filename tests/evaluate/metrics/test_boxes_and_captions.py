"""Boxes in text, captions, SPICE: against definitions, nltk and BiRD's rules."""

import gzip
import json
import shutil
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu

from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.metrics.captions import caption_words
from medplib_jax.evaluate.metrics.programs import meteor_of
from tests.convert.qwen_vl_metric_checks import check_scores
from tests.paths import GOLDEN

BOX = st.tuples(*[st.integers(0, 20)] * 4).map(
    lambda b: [min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])]
)
SENTENCE = st.lists(st.sampled_from("left right lung mass of in".split()), min_size=4, max_size=9).map(
    " ".join
)  # shorter: nltk invents n-grams


def test_boxes_are_read_from_text():
    text = "the <ref>mass</ref><box>(12,30),(240,999)</box> and <box>(1.5, 2),( 3,4.25)</box><box>(1,2)</box>"
    np.testing.assert_array_equal(metrics.parse_boxes(text), [[12, 30, 240, 999], [1.5, 2, 3, 4.25], [0, 0, 0, 0]])
    np.testing.assert_array_equal(metrics.parse_boxes("at (587,126),(789,217)."), [[587, 126, 789, 217]])
    assert metrics.parse_boxes("no box (1,2)").shape == (0, 4)


@settings(max_examples=30)
@given(BOX, BOX)
def test_box_iou_counts_pixels(a, b):
    grid = np.zeros((2, 21, 21), bool)
    for mask, (x1, y1, x2, y2) in zip(grid, (a, b), strict=True):
        mask[y1:y2, x1:x2] = True
    union = (grid[0] | grid[1]).sum()
    expected = (grid[0] & grid[1]).sum() / union if union else 0
    assert metrics.box_iou(np.array([a]), np.array([b]))[0, 0] == pytest.approx(expected)


def test_recall_counts_true_boxes_that_any_prediction_meets():
    true = np.array([[0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    predicted = np.array([[0, 0, 10, 5], [0, 0, 10, 6], [21, 20, 31, 30]])  # 0.5 is not above 0.5
    assert metrics.recall_at_iou(predicted, true) == {"boxes_found": 2, "boxes": 3}
    assert metrics.recall_at_iou(predicted[:1], true) == {"boxes_found": 0, "boxes": 3}
    assert metrics.recall_at_iou(np.zeros((0, 4)), true) == {"boxes_found": 0, "boxes": 3}
    rows = [{"scores": metrics.recall_at_iou(predicted, true)}, {"scores": metrics.recall_at_iou(true[:1], true[:1])}]
    assert metrics.values(metrics.statistics(rows)) == {"recall_at_0.5": 3 / 4}  # of all boxes, not of answers


def test_roc_takes_substrings():
    assert (
        metrics.roc_hit("A CT of the left kidneys", "left kidney") == 1
        and metrics.roc_hit("kidney", "left kidney") == 0
    )


@settings(max_examples=30)
@given(st.lists(st.tuples(SENTENCE, SENTENCE), min_size=1, max_size=4))
def test_bleu_of_a_corpus_equals_nltk(pairs):
    found = metrics.values(metrics.statistics([{"scores": metrics.mia_scores(*pair)} for pair in pairs]))
    answers, truths = ([caption_words(text) for text in texts] for texts in zip(*pairs, strict=True))
    with warnings.catch_warnings(action="ignore"):
        expected = {f"bleu_{n}": corpus_bleu([[truth] for truth in truths], answers, [1 / n] * n) for n in (1, 2, 3, 4)}
    assert {name: found[name] for name in expected} == pytest.approx(
        expected, abs=1e-3
    )  # smoothed like pycocoevalcap: never quite 0
    assert found["mBMR"] == pytest.approx(np.mean([found[name] for name in (*expected, "meteor", "rouge_l")]))


def test_caption_scores_by_hand():
    assert caption_words("The liver's edge, (seen) here.") == ["the", "liver", "'s", "edge", "seen", "here"]
    scores = metrics.mia_scores("a b c d", "a b x d")
    assert (scores["ngrams_1_found"], scores["ngrams_2_found"], scores["ngrams_4_found"]) == (3, 1, 0)
    assert metrics.mia_scores("a a a", "a")["ngrams_1_found"] == 1  # clipped
    assert metrics.mia_scores("a b", "a b c d")["rouge_l"] == pytest.approx(
        (1 + 1.44) * 0.5 / (0.5 + 1.44)
    )  # P 1, R 0.5, beta 1.2


def test_a_sentence_that_ends_within_a_text_leaves_its_stop():
    assert caption_words("A liver. U.S. No. 5 vs. 6, e.g. here.") == "a liver u.s. no. 5 vs. 6 e.g. here".split()
    assert metrics.mia_scores("One lung. A mass.", "One lung! A mass")["ngrams_4_found"] == 1


def test_scores_are_those_of_birds_scripts():
    recorded = json.loads(gzip.decompress((GOLDEN / "qwen_vl" / "metrics.json.gz").read_bytes()))
    rows = list(check_scores(recorded))
    assert len(rows) > 100 and not [row for row in rows if row.error > row.bar]


def test_meteor_by_hand():
    # five of five words in one piece: 1 - 0.5 (1 / 5)^3; stems match, synonyms do not
    assert metrics.meteor("a mass in the lung".split(), "a mass in the lung".split()) == pytest.approx(1 - 0.5 / 125)
    assert metrics.meteor(["masses"], ["mass"]) == pytest.approx(0.5) and metrics.meteor(["tumor"], ["tumour"]) == 0
    assert metrics.mia_scores("", "")["rouge_l"] == 1 and np.isnan(
        metrics.statistics([{"scores": metrics.mia_scores("", "")}])["bleu_1"].value()
    )
    assert metrics.meteor([], []) == 1 and metrics.meteor([], ["a"]) == 0


def test_meteor_of_the_java_programs_counts_is_its_own():
    """Counts of METEOR 1.5 on BiRD's recorded sentences, each and summed."""
    recorded = json.loads(gzip.decompress((GOLDEN / "qwen_vl" / "metrics.json.gz").read_bytes()))["caption_scores"]
    counts = np.array(json.loads((GOLDEN / "qwen_vl" / "meteor_counts.json").read_text()), float)
    np.testing.assert_allclose(meteor_of(counts), recorded["METEOR_each"], atol=1e-12)
    assert meteor_of(counts.sum(0)) == pytest.approx(recorded["METEOR"], abs=1e-12)
    assert np.isnan(meteor_of(np.zeros(counts.shape[1]))) and meteor_of(np.eye(counts.shape[1])[1]) == 0


def test_absent_modalities_count_in_the_reference():
    rows = [{"scores": {"roc_accuracy": 1.0}, "modality": modality} for modality in ("ct", "mr")]
    for protocol, mean in (("exact", 1), ("reference", 2 / 8)):
        found = metrics.by_modality(metrics.statistics(rows, protocol), ["ct", "mr"])
        assert found == {
            "roc_accuracy": 1,
            "roc_accuracy/ct": 1,
            "roc_accuracy/mr": 1,
            "roc_accuracy/modality_mean": mean,
        }


@pytest.mark.parametrize(("name", "score"), [("SPICE", metrics.spice), ("METEOR 1.5", metrics.meteor_counts)])
def test_programs_in_java_say_what_is_missing(monkeypatch, name, score):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(metrics.MissingExtra, match=f"{name} is a Java program, and no `java` is on the PATH"):
        score(["a"], ["b"])
    monkeypatch.setattr(shutil, "which", lambda program: "/usr/bin/java")
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)
    with pytest.raises(metrics.MissingExtra, match=rf"{name} needs pycocoevalcap: pip install -e '\.\[caption\]'"):
        score(["a"], ["b"])
