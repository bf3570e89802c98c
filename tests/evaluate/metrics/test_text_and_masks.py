"""Metrics against what the original program computed, against nltk, and at the edges."""

import json
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import sentence_bleu

from medplib_jax.decode.masks import binarise
from medplib_jax.evaluate import metrics
from tests.paths import GOLDEN

PAIRS = json.loads((GOLDEN / "metrics.json").read_text())["pairs"]
SEG = json.loads((GOLDEN / "metrics.json").read_text())["seg"]
WORDS = st.lists(st.sampled_from("left right lung mass of in".split()), max_size=12)


def summarise(scores, protocol="exact"):
    return metrics.values(metrics.mask_statistics(scores, protocol))


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "metrics.json").read_text())


@pytest.fixture(scope="module")
def masks():
    arrays = np.load(GOLDEN / "metrics_seg.npz")
    return [(binarise(arrays[f"{i}_logits"], 0.1), arrays[f"{i}_gt"] > 0) for i in range(len(SEG))]


def test_normalisation_equals_golden(golden):
    expected = golden["normalize_word(lower)"]
    assert {text: metrics.normalise_answer(text.lower()) for text in expected} == expected


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: repr(pair["pred"]))
def test_open_scores_equal_golden(pair):
    scores = metrics.open_scores(pair["pred"], pair["gt"], "reference")
    expected = dict(
        zip(("f1", "precision", "recall"), pair["f1_precision_recall"], strict=True), exact_match=pair["exact_match"]
    )
    expected |= {"bleu_4": pair["bleu"], "bleu_1": pair["bleu_1"], "bleu_2": pair["bleu_2"], "bleu_3": pair["bleu_3"]}
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-9, abs=1e-300), name
    assert metrics.closed_hit(pair["pred"], pair["gt"], "reference") == pair["closed_hit"]


def test_candidate_hits_equal_golden(golden):
    hits = metrics.candidate_hits(
        [pair["pred"] for pair in PAIRS], [pair["gt"] for pair in PAIRS], golden["candidate_set"], "reference"
    )
    assert hits == [pair["appearance_with_normalization"] for pair in PAIRS]


TEXT = st.lists(st.sampled_from("a left right lung mass".split()), max_size=3).map(" ".join)


@settings(max_examples=50)
@given(
    st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    st.lists(TEXT, min_size=1, max_size=4),
    st.sampled_from(metrics.PROTOCOLS),
)
def test_candidate_hits_equal_the_definition(pairs, others, protocol):
    predictions, truths = zip(*pairs, strict=True)
    candidates = [metrics.normalise_answer(text) for text in sorted({*truths, *others})]
    for hit, prediction, truth in zip(
        metrics.candidate_hits(predictions, truths, [*truths, *others], protocol), predictions, truths, strict=True
    ):
        found = set(metrics.normalise_answer(prediction).split())
        shares = [len(found & set(text.split())) / max(len(set(text.split())), 1) for text in candidates]
        nearest = candidates[int(np.argmax(shares))] if max(shares) > 0 or protocol == "reference" else None
        assert hit == (metrics.normalise_answer(truth) in (nearest, metrics.normalise_answer(prediction)))


def test_gibberish_is_near_to_no_candidate():
    gibberish = ["qqq"], ["ct"], ["ct", "mr"]
    assert metrics.candidate_hits(*gibberish) == [0] and metrics.candidate_hits(*gibberish, "reference") == [1]
    assert metrics.candidate_hits(["a ct scan", "mr of ct"], ["ct", "mr"], ["mr", "ct"]) == [
        1,
        0,
    ]  # in a tie, ct sorts first


def test_table_equals_golden(golden):
    table = golden["cal_metric_table_percent"]
    opened = [pair for pair in PAIRS if pair["answer_type"] in ("open", "other", "number")]
    scores = [metrics.open_scores(pair["pred"], pair["gt"], "reference") for pair in opened]
    names = {
        "exact match acc score": "exact_match",
        "f1 score": "f1",
        "precision": "precision",
        "recall": "recall",
        "bleu_score": "bleu_4",
    }
    names |= {f"bleu_score_{n}": f"bleu_{n}" for n in (1, 2, 3)}
    for theirs, ours in names.items():
        assert 100 * np.mean([score[ours] for score in scores]) == pytest.approx(table[theirs], rel=1e-9)
    closed = [metrics.closed_hit(pair["pred"], pair["gt"], "reference") for pair in PAIRS if pair not in opened]
    assert 100 * np.mean(closed) == pytest.approx(table["yes/no accuracy"])


@settings(max_examples=30)
@given(WORDS, WORDS, st.integers(1, 4))
def test_bleu_equals_nltk(prediction, truth, n):
    with warnings.catch_warnings(action="ignore"):  # nltk warns of every order without a match
        expected = sentence_bleu([truth], prediction, weights=[1 / n] * n)
    assert metrics.bleu(prediction, truth, [1 / n] * n) == pytest.approx(expected, rel=1e-9, abs=1e-300)


@settings(max_examples=30)
@given(WORDS, WORDS)
def test_exact_scores_are_bounded_and_symmetric(prediction, truth):
    f1, precision, recall = metrics.token_f1(prediction, truth)
    assert (f1, recall, precision) == metrics.token_f1(truth, prediction)
    assert 0 <= metrics.rouge_l(prediction, truth) == metrics.rouge_l(truth, prediction) <= f1 + 1e-9 and f1 <= 1
    assert metrics.rouge_l(truth, truth) == metrics.token_f1(truth, truth)[0] == 1


def test_exact_f1_counts_a_repeated_word_once():
    assert metrics.token_f1("cat cat cat".split(), "cat sat on mat".split())[1:] == (pytest.approx(1 / 3), 0.25)


def test_rouge_l_is_the_longest_common_subsequence():
    assert (
        metrics.rouge_l("police killed the gunman".split(), "police kill the gunman".split()) == 0.75
    )  # Lin 2004, section 3.1
    assert metrics.rouge_l("the gunman kill police".split(), "police kill the gunman".split()) == 0.5


@pytest.mark.parametrize(
    ("prediction", "truth"),
    [("有。", "有"), ("左肺，", "“左肺”"), ("ＣＴ　３", "CT 3"), ("【肝脏】！", "肝脏"), ("有", "有？")],
)
def test_full_width_punctuation_makes_no_other_answer(prediction, truth):
    assert metrics.closed_hit(prediction, truth) == 1
    scores = metrics.open_scores(prediction, truth)
    assert scores["exact_match"] == scores["f1"] == scores["rouge_l"] == scores["bleu_1"] == 1
    assert metrics.candidate_hits([prediction], [truth], [truth, "右肾"]) == [1]
    assert metrics.roc_hit(prediction, truth) == 1


def test_characters_are_the_words_of_chinese():
    scores = metrics.open_scores("左肺有肿块", "右肺有肿块。")
    assert [scores[name] for name in ("exact_match", "f1", "rouge_l", "bleu_1")] == pytest.approx([0, 0.8, 0.8, 0.8])
    assert metrics.answer_words("CT显示The肝脏") == ["ct", "显", "示", "肝", "脏"]
    assert metrics.candidate_hits(["是左肺"], ["左肺"], ["左肺", "右肾"]) == [1]
    caption = metrics.mia_scores("左肺有肿块。", "右肺有肿块")
    assert (caption["ngrams_1"], caption["ngrams_1_found"], caption["ngrams_4_found"]) == (5, 4, 1)
    assert caption["rouge_l"] == pytest.approx(0.8)
    assert metrics.answer_words("左肺。", "reference") == ["左肺。"]  # the original's arithmetic


def test_articles_alone_are_answers():
    assert (
        metrics.closed_hit("A", "A.") == 0 and metrics.closed_hit("A", "a") == 1 and metrics.closed_hit("A", "the") == 0
    )
    assert metrics.open_scores("a", "a")["f1"] == 1 and metrics.open_scores("a", "a", "reference")["f1"] == 0


@pytest.mark.parametrize("case", range(len(SEG)))
def test_mask_scores_equal_golden(masks, case):
    prediction, truth = masks[case]
    score = metrics.mask_scores([prediction], [truth], "reference")
    assert [score["intersection"], score["union"]] == [SEG[case]["intersection"][1], SEG[case]["union"][1]]
    assert score["iou"] == pytest.approx(SEG[case]["iou"], rel=1e-6) and score["dice"] == pytest.approx(
        SEG[case]["dice"], rel=1e-6
    )


def test_mask_summary_equals_golden(masks, golden):
    expected = golden["seg_final"]
    summary = summarise([metrics.mask_scores([drawn], [true], "reference") for drawn, true in masks], "reference")
    assert summary["cIoU"] == pytest.approx(expected["ciou"], rel=1e-6)
    assert summary["gIoU"] == pytest.approx(expected["giou_without_1e-5"], rel=1e-6)
    assert summary["mIoU"] == pytest.approx(expected["vqa_infer_miou"], rel=1e-6)
    assert summary["mDice"] == pytest.approx(expected["vqa_infer_mdice"], rel=1e-6)


def test_threshold_equals_the_sigmoid():
    logits = np.linspace(-6, 6, 1001)
    for threshold in (0.1, 0.5, 0.9):
        np.testing.assert_array_equal(binarise(logits, threshold), 1 / (1 + np.exp(-logits)) > threshold)


FULL, EMPTY = np.ones((4, 5), bool), np.zeros((4, 5), bool)
HALF = np.arange(20).reshape(4, 5) < 10


def test_empty_masks_have_defined_scores():
    assert (
        metrics.mask_scores([EMPTY], [EMPTY])["iou"] == 1
        and metrics.mask_scores([EMPTY], [EMPTY], "reference")["iou"] == 0
    )
    assert metrics.mask_scores([], [])["dice"] == 1
    assert metrics.mask_scores([FULL], [EMPTY])["dice"] == 0 and metrics.mask_scores([], [FULL])["dice"] == 0


def test_masks_are_matched_in_order_and_surplus_counts():
    score = metrics.mask_scores([HALF, FULL, FULL], [HALF, HALF])
    assert score["iou"] == pytest.approx((1 + 0.5 + 0) / 3) and (score["intersection"], score["union"]) == (
        20,
        10 + 20 + 20,
    )
    assert metrics.mask_scores([HALF], [~HALF, HALF])["iou"] == 0
    assert (
        metrics.mask_scores([FULL, EMPTY], [HALF])["iou"] == 0.5
    )  # nothing drawn beyond the true mask neither helps nor harms
    assert metrics.mask_scores([HALF, FULL], [HALF], "reference")["iou"] == 1


def test_no_target_questions_count_apart():
    silent, false_mask, empty_mask = (
        metrics.mask_scores([], []),
        metrics.mask_scores([HALF], []),
        metrics.mask_scores([EMPTY], []),
    )
    summary = summarise([metrics.mask_scores([HALF], [FULL]), silent, false_mask, empty_mask])
    assert summary["mIoU"] == 0.5 and summary["mDice"] == pytest.approx(2 / 3)
    assert summary["gIoU"] == pytest.approx((0.5 + 1 + 0 + 1) / 4) and summary["cIoU"] == pytest.approx(10 / 30)
    assert summary["no_target_accuracy"] == pytest.approx(1 / 3) and summary["false_mask_rate"] == pytest.approx(1 / 3)
    assert set(summarise([silent])) == {"gIoU", "no_target_accuracy", "false_mask_rate", "existence_specificity"}
    assert summary["existence_specificity"] == pytest.approx(2 / 3) and summary["existence_precision"] == 0.5


def test_hits_and_false_masks():
    half_right = metrics.mask_scores([HALF], [FULL])  # IoU 0.5, which does not exceed 0.5
    scores = [
        metrics.mask_scores([FULL], [FULL]),
        half_right,
        metrics.mask_scores([], [HALF]),
        metrics.mask_scores([HALF], []),
    ]
    summary = summarise(scores)
    assert (
        summary["hit_rate"] == pytest.approx(2 / 3)
        and summary["precision_at_0.5"] == pytest.approx(1 / 3)
        and summary["false_mask_rate"] == 1
    )


def brute_surface_dice(a, b):
    """Nikolov et al. 2018 by comparing every pair of outline pixels."""
    padded = [np.pad(mask, 1) for mask in (a, b)]
    inner = [p[1:-1, 1:-1] & p[:-2, 1:-1] & p[2:, 1:-1] & p[1:-1, :-2] & p[1:-1, 2:] for p in padded]
    points = [np.argwhere(mask & ~inside) for mask, inside in zip((a, b), inner, strict=True)]
    distances = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    tolerance = metrics.SURFACE_TOLERANCE * np.hypot(*a.shape)
    near = (distances.min(1) <= tolerance).sum() + (distances.min(0) <= tolerance).sum()
    return near / (len(points[0]) + len(points[1]))


@pytest.mark.parametrize("shift", range(0, 12, 3))
def test_surface_dice_equals_the_definition(shift):
    y, x = np.mgrid[:120, :160]
    truth = (y - 60) ** 2 + (x - 100) ** 2 < 45**2  # reaches neither side
    drawn = ((y - 60 - shift) ** 2 + (x - 104) ** 2 < 60**2) & ~((y > 70) & (x > 110))  # is cut off by the right side
    assert metrics.surface_dice(drawn, truth) == pytest.approx(brute_surface_dice(drawn, truth))


def test_surface_dice_of_volumes_is_refused():
    ball = np.ones((4, 4, 4), bool)
    with pytest.raises(ValueError, match=r"surface_dice is of pictures: expected masks \[h, w\], found \(4, 4, 4\)"):
        metrics.surface_dice(ball, ball)
    with pytest.raises(ValueError, match="shape"):
        metrics.surface_dice(ball[0], ball[0, :2])


def test_surface_dice_at_the_edges():
    assert (
        metrics.surface_dice(HALF, HALF) == 1
        and metrics.surface_dice(HALF, EMPTY) == 0
        and metrics.surface_dice(EMPTY, EMPTY) == 1
    )
    scores = [metrics.mask_scores([HALF], [HALF]), metrics.mask_scores([], [HALF]), metrics.mask_scores([HALF], [])]
    assert summarise(scores)["surface_dice"] == 0.5  # questions without a target stay out


def answer_row(answer, expected, modality):
    closed = expected in ("yes", "no")
    scores = (
        {"closed_accuracy": metrics.closed_hit(answer, expected)}
        if closed
        else {f"open_{k}": v for k, v in metrics.open_scores(answer, expected).items()}
    )
    return {"answer": answer, "expected": expected, "modality": modality, "scores": scores}


def test_metrics_of_answers_split_by_modality():
    rows = [
        answer_row("yes", "yes", "ct"),
        answer_row("no", "yes", "ct"),
        answer_row("lung", "lung", "mr"),
        answer_row("left lung", "left liver", "mr"),
    ]
    found = metrics.by_modality(metrics.statistics(rows), [row["modality"] for row in rows])
    assert (found["accuracy"], found["accuracy/ct"], found["accuracy/mr"], found["accuracy/modality_mean"]) == (
        0.5,
        0.5,
        0.5,
        0.5,
    )
    assert (
        found["closed_accuracy"] == 0.5
        and "closed_accuracy/mr" not in found
        and found["closed_accuracy/modality_mean"] == 0.5
    )
    assert found["open_f1"] == pytest.approx((1 + 0.5) / 2) and "open_f1/ct" not in found
    assert (
        found["open_candidate_accuracy/mr"] == 0.5
    )  # "left lung" is nearest to "lung", an expected answer of the file
    assert metrics.by_modality(metrics.statistics([rows[0] | {"modality": ""}]), [""]).keys() >= {"accuracy/none"}


@pytest.mark.parametrize("protocol", metrics.PROTOCOLS)
def test_a_part_of_the_records_has_the_metrics_of_its_own_rows(protocol):
    rng = np.random.default_rng(0)
    draw = lambda: [rng.random((6, 6)) < 0.4] * int(rng.integers(0, 2))
    rows = [{"scores": metrics.mask_scores(draw(), draw(), protocol)} for _ in range(30)]
    chosen = rng.random(30) < 0.5
    whole = metrics.statistics(rows, protocol)
    part = metrics.statistics([row for row, keep in zip(rows, chosen, strict=True) if keep], protocol)
    assert metrics.values({name: statistic[chosen] for name, statistic in whole.items()}) == pytest.approx(
        metrics.values(part)
    )


def test_yes_and_no_are_told_apart():
    pairs = [("Yes.", "yes"), ("no", "yes"), ("maybe", "yes"), ("yes", "no"), ("No", "no"), ("no idea", "no")]
    rows = [answer_row(answer, expected, "ct") for answer, expected in pairs]
    rows.append({"answer": "left", "expected": "left", "modality": "ct", "scores": {"closed_accuracy": 1.0}})
    found = metrics.values(metrics.statistics(rows))
    assert found["yes_sensitivity"] == pytest.approx(1 / 3) and found["yes_specificity"] == pytest.approx(2 / 3)
    assert found["yes_precision"] == 0.5 and found["closed_accuracy"] == pytest.approx(3 / 7)
    assert "yes_precision" not in metrics.values(metrics.statistics(rows[-1:]))


def test_bad_input_is_named():
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 4\)"):
        metrics.mask_scores([HALF], [HALF.T])
    with pytest.raises(ValueError, match="'referenec' is not one of"):
        metrics.statistics([], "referenec")
