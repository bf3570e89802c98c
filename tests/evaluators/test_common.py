"""Evaluators on stand-in generators whose answers are known, so that every score is known, too."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.extra.numpy import arrays as numpy_arrays

from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.sources import MASK, MecovqaSource
from medplib_jax.data.tokenizer import Tokenizer
from medplib_jax.decode import Generation
from medplib_jax.evaluators.common import Predictions, decode_rle, encode_rle, mask_drawer
from medplib_jax.evaluators.grounding import GroundingEvaluator
from medplib_jax.evaluators.region import RegionVqaEvaluator
from medplib_jax.evaluators.vqa import VqaEvaluator, is_closed
from tests.evaluators import tiny

KINDS = {"grounding": GroundingEvaluator, "region": RegionVqaEvaluator, "vqa": VqaEvaluator}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.write_data(tmp_path_factory.mktemp("data") / "root")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    return tiny.make_experiment(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def make(folder, experiment, tmp_path):
    """An evaluator of one of the folder's files, and the stand-in generator that gives the expected answers."""

    def build(kind, batch_size=2, source=None):
        source = source or MecovqaSource(str(folder / "test" / f"{kind}.json"), str(folder))
        tokenizer = Tokenizer.load(experiment.data.tokenizer)
        loader = Loader([source], tokenizer, experiment.data, experiment.model)
        draw = {"draw_masks": lambda batch, generation: batch.gt_masks > 0} if kind == "grounding" else {}
        evaluator = KINDS[kind](kind, loader, tokenizer, range(len(source)), tmp_path, {"task": kind}, batch_size=batch_size, **draw)
        return evaluator, Oracle(loader, tokenizer)

    return build


class Oracle:
    """Answers with `text` of the record: its expected answer unless told otherwise. Counts its calls."""

    def __init__(self, loader, tokenizer):
        self.loader, self.tokenizer, self.calls = loader, tokenizer, 0

    def text(self, record, batch, row):
        return MASK.sub("", record.turns[-1][1])

    def __call__(self, batch):
        self.calls += 1
        B, M = batch.mask_valid.shape
        tokens, lengths, mask_valid = np.zeros((B, 60), np.int32), np.zeros(B, np.int32), np.zeros((B, M), bool)
        for row in np.flatnonzero(batch.record >= 0):
            ids = self.tokenizer.encode(self.text(self.loader.record(int(batch.record[row])), batch, row))
            tokens[row, : len(ids)], lengths[row] = ids, len(ids)
            mask_valid[row, : ids.count(self.tokenizer.seg_id)] = True
        return Generation(tokens, lengths, mask_valid, np.zeros((B, M, 4, 4), np.float32), np.ones((B, M), np.float32))


def test_expected_answers_score_one(make):
    for kind in KINDS:
        evaluator, oracle = make(kind)
        values = dict(evaluator.run(oracle))
        assert values.pop("false_mask_rate", 0) == 0
        without = ("false", "open_bleu_3", "open_bleu_4", "open_meteor")  # the answers have two words
        ones = {name: value for name, value in values.items() if not name.startswith(without)}
        assert ones and all(value == pytest.approx(1) for value in ones.values()), kind
        assert all(f"{name}/{modality}" in ones for name in ones if "/" not in name for modality in ("ct", "mr", "modality_mean"))


def test_masks_follow_the_answer(make):
    evaluator, oracle = make("grounding")
    oracle.text = lambda record, batch, row: "It is <SEG>."  # one mask always: right for one, half for two, false for none
    values = dict(evaluator.run(oracle))
    assert values["mIoU"] == pytest.approx((1 + 0.5) / 2) and values["gIoU"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert values["no_target_accuracy"] == 0 and values["false_mask_rate"] == 0  # a <SEG>, but nothing drawn
    row = evaluator.rows()[1]
    assert row["scores"]["masks"] == 1 and len(row["masks"]) == 1 and len(row["true_masks"]) == 2
    np.testing.assert_array_equal(decode_rle(row["masks"][0]), np.broadcast_to(np.arange(30) < 15, (40, 30)))


def test_every_answer_is_kept_with_its_question(make):
    evaluator, oracle = make("vqa", batch_size=3)  # the last batch holds filler rows
    dict(evaluator.run(oracle))
    rows = evaluator.rows()
    assert [row["record"] for row in rows] == [0, 1, 2, 3]
    assert rows[1] | {"scores": None} == {
        "record": 1, "image": ["images/ct_00--a.png"], "modality": "ct", "question": "<image>\nWhat organ is it?", "answer": "left lung",
        "expected": "left lung", "answer_type": "open", "scores": None,
    }  # fmt: skip


def test_the_region_reaches_the_generator(make):
    evaluator, oracle = make("region")

    def side_of_points(record, batch, row):
        x = batch.region_points[row, 0, batch.region_point_valid[row, 0], 0]
        return "the left lung" if x.mean() < 0.5 else "the right lung"

    oracle.text = side_of_points
    assert dict(evaluator.run(oracle))["open_exact_match"] == 1


def test_a_lost_region_is_refused(make):
    evaluator, oracle = make("region")

    def lose(batch):
        batch.region_point_valid[:] = False
        return oracle(batch)

    with pytest.raises(DataError, match="record 0: region is not in the batch; expected 1 regions, found 0 with points, 1 in the text"):
        dict(evaluator.run(lose))


def test_a_killed_run_continues_at_the_record(make):
    evaluator, oracle = make("vqa")

    def dies(batch):
        if oracle.calls:
            raise KeyboardInterrupt
        return oracle(batch)

    with pytest.raises(KeyboardInterrupt):
        dict(evaluator.run(dies))
    path = evaluator.predictions.path
    whole = path.read_text()
    path.write_text(whole + '{"record": 2, "ima')  # killed in the middle of a line
    again, oracle = make("vqa", batch_size=1)
    assert path.read_text() == whole and sorted(again.predictions.rows) == [0, 1]
    values = dict(again.run(oracle))
    assert oracle.calls == 2 and values["closed_accuracy"] == 1
    third, oracle = make("vqa")
    assert dict(third.run(oracle)) == values and oracle.calls == 0


def test_predictions_of_another_run_are_not_mixed(tmp_path):
    Predictions(tmp_path / "a.jsonl", {"task": "a", "checkpoint": "1"}).add([{"record": 0}])
    with pytest.raises(ValueError, match=r"a\.jsonl.*different checkpoint"):
        Predictions(tmp_path / "a.jsonl", {"task": "a", "checkpoint": "2"})
    assert Predictions(tmp_path / "a.jsonl", {"task": "a", "checkpoint": "1"}).rows == {0: {"record": 0}}


def test_bad_record_is_skipped_by_name_or_raised(make, folder, experiment, tmp_path):
    records = json.loads((folder / "test" / "vqa.json").read_text())
    records[1]["image"] = "images/lost.png"
    (folder / "test" / "broken.json").write_text(json.dumps(records))
    source = MecovqaSource(str(folder / "test" / "broken.json"), str(folder))
    evaluator, oracle = make("vqa", source=source)
    with pytest.raises(DataError, match="record 1: file is missing"):
        dict(evaluator.run(oracle))
    tokenizer = Tokenizer.load(experiment.data.tokenizer)
    loader = Loader([source], tokenizer, dataclasses.replace(experiment.data, on_error="skip"), experiment.model)
    evaluator = VqaEvaluator("skipping", loader, tokenizer, range(4), tmp_path, {}, batch_size=2)
    assert dict(evaluator.run(Oracle(loader, tokenizer)))["closed_accuracy"] == 1
    assert [error.record for error in evaluator.skipped] == [1] and len(evaluator.rows()) == 3


def test_kind_of_question():
    assert is_closed("CLOSED", "left") and is_closed("", "No.") and not is_closed("", "left") and not is_closed("number", "2")
    with pytest.raises(ValueError, match="answer_type 'essay' is not one of"):
        is_closed("essay", "yes")


@settings(deadline=None, max_examples=30)
@given(numpy_arrays(bool, st.tuples(st.integers(1, 6), st.integers(1, 6))))
def test_run_lengths_round_trip(mask):
    rle = json.loads(json.dumps(encode_rle(mask)))
    np.testing.assert_array_equal(decode_rle(rle), mask)
    assert sum(rle["counts"]) == mask.size and 0 not in rle["counts"][1:]


def test_run_lengths_are_column_major_and_begin_with_zeros():
    assert encode_rle(np.array([[True, False], [True, True]])) == {"size": [2, 2], "counts": [0, 2, 1, 1]}


def test_drawn_masks_lie_on_the_picture(make):
    evaluator, oracle = make("grounding", batch_size=1)
    batch = None

    def keep(prompts):
        nonlocal batch
        batch = batch or prompts
        return oracle(prompts)

    dict(evaluator.run(keep))
    upper = np.where(np.arange(8) < 4, 5.0, -5.0).astype(np.float32)[:, None].repeat(8, 1)
    generation = Generation(None, None, None, np.stack([upper, np.full((8, 8), -5, np.float32)])[None], None)
    drawn = mask_drawer(32, "exact", 64, 0.5)(batch, generation)[0, :, :40, :30]
    assert drawn[0, :19].all() and not drawn[0, 21:].any() and not drawn[1].any()
