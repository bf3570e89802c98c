"""Batches against their declared form, and what happens to records that cannot be used."""

import dataclasses
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ClipConfig, MaskConfig, ModelConfig, RegionConfig
from medplib_jax.data import images
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.pipeline import BatchPlan, Loader, eval_batches, make_loader, train_batches
from tests.paths import GOLDEN, ROOT

MODEL = ModelConfig(clip=ClipConfig(image_size=28), mask=MaskConfig(image_size=32), region=RegionConfig(max_points=16))
BUCKETS = (128, 160, 256)
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def text_only(question, answer):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def turns(question, answer):
    return text_only("<image>\n" + question, answer)


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a mask, and seven records of every kind."""
    rng = np.random.default_rng(0)
    for name, size in (("wide", (20, 30)), ("tall", (40, 16))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(tmp_path / f"{name}.png")
        mask = np.zeros(size, np.uint8)
        mask[5:12, 4:9] = 255
        Image.fromarray(mask).save(tmp_path / f"{name}_mask.png")
    write_good(tmp_path)
    return tmp_path


def write_good(folder):
    write(
        folder,
        [
            {"image": "wide.png", "conversations": turns("What is it?", "A liver.")},
            {"image": "wide.png", "conversations": turns("Segment it.", "It is <SEG>.<mask>wide_mask.png</mask>")},
            {
                "image": "tall.png",
                "conversations": turns(
                    "Segment it.", "<SEG><mask>tall_mask.png</mask> and <SEG><mask>tall_mask</mask>"
                ),
            },
            {"image": "tall.png", "conversations": turns("What is <region>tall_mask.png</region> here?", "A kidney.")},
            {
                "image": "tall.png",
                "conversations": turns("Is <region>point:3,5</region> in <region>box:0,0,9,9</region>?", "Yes."),
            },
            {"conversations": text_only("What is pneumonia?", "An infection.")},
            {"image": "wide.png", "conversations": turns("Describe it at length. " * 6, "A cyst.")},
        ],
    )


def write(folder, records):
    (folder / "train.json").write_text(json.dumps(records))


def config(folder, **changes):
    values = {
        "batch_size": 4,
        "max_regions": 2,
        "max_masks": 2,
        "mask_canvas": 32,
        "bucket_lengths": BUCKETS,
        "workers": 0,
    } | changes
    return DataConfig(sources=(str(folder / "train.json"),), tokenizer=str(GOLDEN / "tokenizer"), **values)


def add(folder, *records):
    write(folder, json.loads((folder / "train.json").read_text()) + list(records))


def epoch(folder, rows=range(4), **changes):
    loader = make_loader(config(folder, **changes), MODEL)
    plan, problems = loader.plan(seed=0)
    return list(train_batches(loader, plan, rows, 0, plan.steps_per_epoch, workers=0)), problems


def check_form(arrays, rows, length):
    """Every field of `types.Batch`, with its declared dtype, and one size per axis letter."""
    sizes = {"B": rows, "L": length, "3": 3, "4": 4, "2": 2}
    fields = [field for field in dataclasses.fields(Batch) if field.name not in ("segment", "example_masks")]
    assert set(arrays) == {field.name for field in fields}
    for field in fields:
        array = arrays[field.name]
        axes = field.type.dim_str.split()
        assert array.dtype.name in field.type.dtypes, field.name
        assert array.shape == tuple(
            sizes.setdefault(axis, size) for axis, size in zip(axes, array.shape, strict=True)
        ), field.name
    assert [sizes[axis] for axis in "N Ic Is R S M I J".split()] == [1, 28, 32, 2, 16, 2, 32, 32]


def test_batches_have_their_declared_form_and_hold_every_record(folder):
    batches, problems = epoch(folder)
    assert problems == [] and [skipped for _, skipped in batches] == [[], []]
    for arrays, _ in batches:
        check_form(arrays, 4, arrays["tokens"].shape[1])
    assert sorted(np.concatenate([arrays["record"] for arrays, _ in batches])) == [-1, *range(7)]


def row_of(folder, record, **changes):
    for arrays, _ in epoch(folder, **changes)[0]:
        for row in np.flatnonzero(arrays["record"] == record):
            return {name: array[row] for name, array in arrays.items()}
    raise AssertionError(f"record {record} is in no batch")


def test_masks_lie_in_the_corner_of_the_canvas(folder):
    row = row_of(folder, 1)
    assert row["mask_valid"].tolist() == [True, False]
    assert row["mask_size"].tolist() == [20, 30]
    expected = np.zeros((32, 32))
    expected[5:12, 4:9] = 1
    np.testing.assert_array_equal(row["gt_masks"][0], expected)
    assert not row["gt_masks"][1].any()
    assert row["sam_box"].tolist() == [5, 0, 21, 32]
    assert row["targets"][row["seg_position"][0]] == 400 and row["loss_weights"][row["seg_position"][0]] == 1


def test_masks_larger_than_the_canvas_shrink(folder):
    row = row_of(folder, 2)
    assert row["mask_valid"].tolist() == [True, True]
    assert row["mask_size"].tolist() == [32, 13]
    assert row["gt_masks"][:, :, 13:].sum() == 0
    assert 0 < row["gt_masks"][0].sum() < 7 * 5


def test_regions_fill_their_slots(folder):
    row = row_of(folder, 4)
    assert row["region_point_valid"][0].sum() == 1 and row["region_point_valid"][1].sum() == 16
    assert row["region_image"].tolist() == [0, 0]
    assert sorted(row["feature_index"][row["feature_index"] >= 0]) == [0, 1, 2, 3, 4, 5]


def test_empty_rows_count_nowhere(folder):
    row = row_of(folder, -1)
    assert not row["loss_weights"].any() and not row["mask_valid"].any() and not row["region_point_valid"].any()
    assert row["valid"].sum() == 1


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_processes_read_disjoint_rows_of_the_same_batch(folder, processes):
    whole, _ = epoch(folder)
    assert whole
    shares = [epoch(folder, rows=range(first, 4, processes))[0] for first in range(processes)]
    for step, (arrays, _) in enumerate(whole):
        for first in range(processes):
            for name, array in shares[first][step][0].items():
                np.testing.assert_array_equal(array, arrays[name][first::processes])


def test_resuming_gives_the_same_batches(folder):
    loader = make_loader(config(folder), MODEL)
    plan, _ = loader.plan(seed=0)
    whole = list(train_batches(loader, plan, range(4), 0, 5, workers=0))
    resumed = list(train_batches(pickle.loads(pickle.dumps(loader)), plan, range(4), 3, 5, workers=0))
    for (expected, _), (found, _) in zip(whole[3:], resumed, strict=True):
        for name in expected:
            np.testing.assert_array_equal(found[name], expected[name])


BAD_TEXT = [
    ({"image": "wide.png"}, "record without conversations"),
    ({"image": "wide.png", "conversations": [{"from": "system", "value": "x"}]}, "unknown role"),
    ({"image": "wide.png", "conversations": turns("Segment it.", "It is <SEG>.")}, "<SEG> and masks do not pair up"),
    (
        {"image": "wide.png", "conversations": turns("Segment it. " * 40, "No.")},
        "text too long; expected at most 256 positions",
    ),
    (
        {"image": "wide.png", "conversations": turns("<region>point:1,1</region>" * 3, "No.")},
        "too many regions; .* 2, found 3",
    ),
    (
        {"image": "wide.png", "conversations": turns("All.", "<SEG><mask>wide_mask.png</mask>" * 3)},
        "too many masks; .* 2, found 3",
    ),
    (
        {"image": ["wide.png"] * 2, "conversations": turns("<image>?", "No.")},
        "too many images; expected at most 1, found 2",
    ),
]
BAD_FILES = [
    ({"image": "gone.png", "conversations": turns("What?", "No.")}, "file is missing"),
    ({"image": "broken.png", "conversations": turns("What?", "No.")}, "picture cannot be read .*broken.png"),
    ({"image": "../train.json", "conversations": turns("What?", "No.")}, "path leaves the data folder"),
    (
        {"image": "wide.png", "conversations": turns("Segment.", "<SEG><mask>tall_mask.png</mask>")},
        "mask and picture differ .*20 x 30",
    ),
    (
        {"image": "wide.png", "conversations": turns("<region>tall_mask.png</region>?", "No.")},
        "mask and picture differ in size",
    ),
    (
        {"image": "wide.png", "conversations": turns("<region>point:31,3</region>?", "No.")},
        "region is outside the picture",
    ),
    ({"image": "wide.png", "conversations": turns("<region>empty.png</region>?", "No.")}, "region is empty"),
    (
        {"image": [], "conversations": text_only("Segment it.", "<SEG><mask>wide_mask.png</mask>")},
        "mask without an image",
    ),
]


@pytest.fixture
def bad_files(folder):
    (folder / "broken.png").write_text("no picture")
    Image.new("L", (30, 20)).save(folder / "empty.png")
    return folder


@pytest.mark.parametrize(("record", "message"), BAD_TEXT + BAD_FILES)
def test_a_bad_record_stops_the_run_and_is_named(bad_files, record, message):
    add(bad_files, record)
    with pytest.raises(DataError, match=rf"train.json, record 7: {message}") as caught:
        epoch(bad_files)
    assert "Grain" not in str(caught.value)


def test_bad_texts_are_left_out_of_the_plan(folder):
    add(folder, *[record for record, _ in BAD_TEXT])
    batches, problems = epoch(folder, on_error="skip")
    assert [error.record for error in problems] == list(range(7, 7 + len(BAD_TEXT)))
    assert sorted(np.concatenate([arrays["record"] for arrays, _ in batches])) == [-1, *range(7)]


def test_bad_files_are_replaced_by_records_of_the_bucket_and_named(bad_files):
    add(bad_files, *[record for record, _ in BAD_FILES])
    first, again = (epoch(bad_files, on_error="skip")[0] for _ in range(2))
    skipped = [error for _, errors in first for error in errors]
    assert {error.record for error in skipped} == set(range(7, 7 + len(BAD_FILES)))
    records = np.concatenate([arrays["record"] for arrays, _ in first])
    assert set(records) - {-1} == set(range(7))
    assert (records == -1).sum() == 1  # only the row that the plan leaves empty
    np.testing.assert_array_equal(records, np.concatenate([arrays["record"] for arrays, _ in again]))


def test_replacements_are_sought_only_when_needed(folder, monkeypatch):
    monkeypatch.setattr(BatchPlan, "replacements", None)  # takes as long as the dataset is large
    assert len(epoch(folder)[0]) == 2


def test_a_bucket_without_a_good_record_gives_up(bad_files):
    write(bad_files, [BAD_FILES[0][0]])
    with pytest.raises(DataError, match="file is missing"):
        epoch(bad_files, on_error="skip")


def test_odd_files_are_noted_and_used(folder):
    Image.fromarray(np.full((20, 30), 700, np.uint16)).save(folder / "wide.png")
    batches, _ = epoch(folder)
    notices = [error for _, errors in batches for error in errors]
    assert notices  # two threads that prepare it at once both say so
    for notice in notices:
        assert isinstance(notice, Notice) and notice.found == "mode I;16" and notice.record in (0, 1, 6)
        assert notice.as_dict()["used"] and "wide.png" in str(notice)
    assert sorted(np.concatenate([arrays["record"] for arrays, _ in batches])) == [-1, *range(7)]


def test_an_empty_mask_is_noted(folder):
    Image.new("L", (30, 20)).save(folder / "wide_mask.png")
    notices = [error for _, errors in epoch(folder)[0] for error in errors]
    assert {(notice.record, notice.what.split(" (")[0], type(notice)) for notice in notices} == {
        (1, "mask is empty", Notice)
    }


def test_evaluation_logs_notices_and_counts_errors_only(folder, caplog):
    Image.new("RGBA", (30, 20), (9, 9, 9, 9)).save(folder / "wide.png")
    assert not any(errors for _, errors in evaluate(folder, question=True))
    assert "mode RGBA" in caplog.text


def test_the_disk_cache_changes_nothing_but_the_time(folder, tmp_path_factory, monkeypatch):
    cache = str(tmp_path_factory.mktemp("cache"))
    plain, _ = epoch(folder)
    for run in range(2):
        if run:
            monkeypatch.setattr(images, "load_image", None)  # everything is there
            monkeypatch.setattr(images, "load_mask", None)
        for (expected, _), (found, _) in zip(plain, epoch(folder, cache=cache)[0], strict=True):
            for name, array in expected.items():
                np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_a_changed_picture_is_prepared_anew(folder, tmp_path_factory):
    cache = str(tmp_path_factory.mktemp("cache"))
    before = row_of(folder, 0, cache=cache)["clip_pixels"]
    Image.new("RGB", (30, 20), (7, 7, 7)).save(folder / "wide.png")
    after = row_of(folder, 0, cache=cache)["clip_pixels"]
    assert (after[0, 14, 14] == 7).all() and not np.array_equal(before, after)


@pytest.mark.parametrize("mode", ["exact", "reference"])
def test_augmented_regions_are_parts_and_come_back_on_resuming(folder, mode):
    Image.fromarray(np.full((40, 16), 255, np.uint8)).save(folder / "tall_mask.png")
    model = dataclasses.replace(MODEL, region=RegionConfig(max_points=512))
    loader = make_loader(config(folder, region_augmentation=mode), model)
    plan, _ = loader.plan(seed=0)
    whole = [arrays for arrays, _ in train_batches(loader, plan, range(4), 0, 40, workers=0)]
    (resumed, _), *_ = train_batches(loader, plan, range(4), 39, 40, workers=0)
    np.testing.assert_array_equal(resumed["region_points"], whole[-1]["region_points"])
    counts = [
        int(arrays["region_point_valid"][row, 0].sum())
        for arrays in whole
        for row in np.flatnonzero(arrays["record"] == 3)
    ]
    evaluated, _ = loader.load_eval([3], [0], True)
    cells = evaluated["region_point_valid"][0, 0].sum()  # evaluation sees the whole region
    assert cells == 24 * 9  # the picture is 16 of 40 wide
    assert all(0.2 * cells <= count <= cells for count in counts)
    assert len(set(counts)) > 10 if mode == "exact" else np.mean(np.array(counts) == cells) > 0.8


def evaluate(folder, question, rows=range(3), **changes):
    loader = make_loader(config(folder, **changes), MODEL)
    return list(eval_batches(loader, range(len(loader)), 3, rows, question, workers=0))


def test_evaluation_reads_in_order_and_fills_the_last_batch(folder):
    batches = evaluate(folder, question=False)
    assert np.concatenate([arrays["record"] for arrays, _ in batches]).tolist() == [*range(7), -1, -1]
    second_rows = evaluate(folder, question=False, rows=[1])
    for (arrays, _), (share, _) in zip(batches, second_rows, strict=True):
        np.testing.assert_array_equal(share["tokens"], arrays["tokens"][1:2])  # the bucket is that of the whole batch


def test_questions_end_where_the_answer_begins_and_keep_its_masks(folder):
    arrays, _ = evaluate(folder, question=True)[0]
    loader = make_loader(config(folder), MODEL)
    ends = arrays["valid"].sum(axis=1)
    colon = loader.encode(loader.record(0)).tokens[ends[0] - 1]
    assert (arrays["tokens"][np.arange(3), ends - 1] == colon).all()
    assert not arrays["loss_weights"].any()
    assert arrays["mask_valid"].tolist() == [[False, False], [True, False], [True, True]]
    assert arrays["gt_masks"][1, 0].sum() == 7 * 5
    assert loader.encode(loader.record(1), question=True).answer == "It is <SEG>."


def test_a_skipped_record_leaves_its_row_of_an_evaluation_empty(bad_files):
    add(bad_files, BAD_FILES[0][0], BAD_TEXT[0][0])
    batches = evaluate(bad_files, question=True, on_error="skip")
    assert np.concatenate([arrays["record"] for arrays, _ in batches]).tolist() == [*range(7), -1, -1]
    assert [error.record for _, errors in batches for error in errors] == [7, 8]
    with pytest.raises(DataError, match="record 8: record without conversations"):
        evaluate(bad_files, question=True)


def test_worker_processes_give_the_same_batches_and_errors(bad_files):
    """In a process of its own, because worker processes import the main module again."""
    write(bad_files, [record for record, _ in BAD_FILES])
    broken = bad_files / "broken.json"
    (bad_files / "train.json").rename(broken)
    write_good(bad_files)
    script = bad_files / "script.py"
    good = config(bad_files)
    script.write_text(
        WORKER_SCRIPT.format(data=good, model=MODEL, broken=dataclasses.replace(good, sources=(str(broken),)))
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    steps, equal, record = done.stdout.split()
    assert (steps, equal) == ("5", "equal")
    assert 0 <= int(record) < len(BAD_FILES)


WORKER_SCRIPT = """
import numpy as np
from medplib_jax.config.model import *
from medplib_jax.data import images
from medplib_jax.data.errors import DataError, Notice
from medplib_jax.data.pipeline import make_loader, train_batches
from medplib_jax.config.experiment import DataConfig

if __name__ == "__main__":
    loader = make_loader({data!r}, {model!r})
    plan, _ = loader.plan(seed=0)
    here, there = (list(train_batches(loader, plan, range(4), 0, 5, workers)) for workers in (0, 2))
    print(len(there))
    equal = all(np.array_equal(a[name], b[name]) for (a, _), (b, _) in zip(here, there, strict=True) for name in a)
    print("equal" if equal else "different")
    broken = make_loader({broken!r}, {model!r})
    try:
        list(train_batches(broken, plan, range(4), 0, 1, 1))
    except DataError as error:
        print(error.record)
"""


def test_reading_data_does_not_import_jax():
    code = "import sys, medplib_jax.data.pipeline; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)


def test_the_texts_of_a_file_are_tokenized_once(folder, tmp_path_factory, monkeypatch):
    add(folder, BAD_TEXT[0][0])
    data = config(folder, cache=str(tmp_path_factory.mktemp("cache")), on_error="skip")
    first, problems = make_loader(data, MODEL).plan(seed=0)
    monkeypatch.setattr(Loader, "encode", None)
    again, same = make_loader(data, MODEL).plan(seed=0)
    assert [str(error) for error in same] == [str(error) for error in problems] != []
    np.testing.assert_array_equal(first.batch(0)[1], again.batch(0)[1])
    with pytest.raises(DataError, match="record 7: record without conversations"):
        make_loader(dataclasses.replace(data, on_error="raise"), MODEL).plan(seed=0)
    monkeypatch.undo()
    write(folder, json.loads((folder / "train.json").read_text())[:3])
    changed, _ = make_loader(data, MODEL).plan(seed=0)
    assert set(changed.batch(0)[1]) == {-1, 0, 1, 2}
