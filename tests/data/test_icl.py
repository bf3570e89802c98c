"""Records with examples against the original's: their forms, texts, pictures and masks; what is refused by name."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ClipConfig, IclConfig, MaskConfig, ModelConfig, RegionConfig
from medplib_jax.data import icl, images
from medplib_jax.data.errors import DataError
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import parse_record
from medplib_jax.data.sources import MecovqaSource, digest
from medplib_jax.data.tokenizers import Tokenizer
from tests.paths import GOLDEN

FOLDER = GOLDEN / "icl"
CASES = json.loads((FOLDER / "source.json").read_text())
REFUSED = {  # by the number of the case in one mode: what the original passes over, or dies of
    2: "too many examples; expected 1 to 3 pictures with their masks, found 4",
    4: "no example; expected 1 to 3",
    5: "no example; expected 1 to 3",
    8: "example without a mask; expected the mask of image2, c.png",
    10: "too many examples; .* found 4",
    14: "<SEG> and masks do not pair up",
}
PER_MODE = len(CASES) // 2
MODEL = ModelConfig(clip=ClipConfig(image_size=56), mask=MaskConfig(image_size=256), region=RegionConfig(max_points=16))
BATCHES = {
    "overlay_multi": ("items.json", (0, 1)),
    "overlay_compress_multi": ("items.json", (0, 1)),
    "overlay_3shot_multi": ("items_3.json", (0, 2)),
    "separate_multi": ("items.json", (0, 1)),
    "separate_maskenc_multi": ("items.json", (0, 1)),
    "separate_maskenc_3shot_multi": ("items_3.json", (0, 1)),
}
IGNORED, IMAGE = -100, -200


def parse(raw, root=FOLDER):
    return parse_record(raw, "records.json", 0, str(root))


def spelled(case):
    record = icl.spelled_out(parse(case["record"]), IclConfig(masks=case["mode"]))
    return record, [{"from": role, "value": text} for role, text in record.turns]


@pytest.mark.parametrize("number", [i for i in range(len(CASES)) if i % PER_MODE not in (*REFUSED, 12)])
def test_published_forms_read_as_the_originals(number):
    case = CASES[number]
    record, conversation = spelled(case)
    assert [{"image": image, "mask": mask} for image, mask in record.examples] == case["examples"]
    assert record.images == (case["target_image"],)
    assert conversation == case["conversations"]
    assert record.references == tuple(dict.fromkeys(record.references))
    assert {name for example in record.examples for name in example} <= set(record.references)


def test_a_record_is_read_the_same_again_and_again():
    """The original adds the target to the examples of a numbered record when it is read a second time."""
    case = next(case for case in CASES if "image2" in case["record"])
    raw = case["record"] | {}
    assert parse(raw) == parse(raw) and raw == case["record"]


@pytest.mark.parametrize(("number", "message"), [*REFUSED.items(), *((i + PER_MODE, m) for i, m in REFUSED.items())])
def test_what_the_original_passes_over_is_named(number, message):
    with pytest.raises(DataError, match=message) as caught:
        spelled(CASES[number])
    assert str(caught.value).startswith("records.json, record 0: ")


def test_a_text_that_names_more_pictures_than_are_shown_is_refused():
    with pytest.raises(DataError, match="do not pair up; expected 2 <image> with examples, found 3"):
        spelled(CASES[12])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"icl_examples": [{"image": "b.png"}]}, "example without a mask; expected the mask of icl_examples.0., b.png"),
        ({"icl_examples": [{"mask": "b.png"}]}, "icl_examples.0.: image is not a path; expected a path, found None"),
        ({"icl_examples": "b.png"}, "icl_examples is not a list of examples"),
        ({"icl_examples": [{"image": "a.png", "mask": "a_mask.png"}]}, "the target is its own example"),
        ({"image": None}, "image is not a path; expected a path, found None"),
        ({"target_mask": 3}, "target mask is not a path; expected a path, found 3"),
    ],
)
def test_unusable_examples_are_named(changes, message):
    with pytest.raises(DataError, match=message):
        parse(CASES[0]["record"] | changes)


def test_overlay_and_masks_equal_the_originals():
    expected = np.load(FOLDER / "preprocess.npz")
    picture = images.load_pixels(str(FOLDER / "a.png"))
    mask = images.load_mask(str(FOLDER / "a_mask.png"), picture.shape[:2])
    np.testing.assert_array_equal(icl.overlaid(picture, mask), expected["overlay_a"])
    np.testing.assert_array_equal(icl.mask_picture(mask), expected["mask_rgb_a"])
    np.testing.assert_array_equal(icl.encoder_mask(mask), expected["encoder_mask_a"][0])


def loader_of(source, config, **changes):
    data = DataConfig(bucket_lengths=(512,), batch_size=2, max_images=7, mask_canvas=256, **changes)
    tokenizer = Tokenizer.load(str(GOLDEN / "tokenizer"))
    return Loader([source], tokenizer, data, dataclasses.replace(MODEL, icl=config))


def config_of(name, recorded):
    is_mask, lengths = recorded["token_is_mask"], recorded["token_lengths"]
    compressed = int(lengths[0]) if lengths[0] != MODEL.clip.num_patches else 0
    return IclConfig(name.split("_")[0], compressed, int(lengths[is_mask][0]) if is_mask.any() else 0)


def collapsed(arrays, row, starts):
    """Ids and labels of a row as the original writes them, one image token for each picture or mask."""
    index, length = arrays["feature_index"][row], int(arrays["valid"][row].sum())
    labels = np.full(length, IGNORED)
    labels[1:] = np.where(arrays["loss_weights"][row, : length - 1], arrays["targets"][row, : length - 1], IGNORED)
    ids = np.where(index[:length] >= 0, IMAGE, arrays["tokens"][row, :length])
    kept = (index[:length] < 0) | np.isin(index[:length], starts)
    return ids[kept].tolist(), labels[kept].tolist()


@pytest.mark.parametrize("name", BATCHES)
def test_batches_with_examples_equal_the_originals(name):
    recorded = {
        key.split("/")[1]: x for key, x in np.load(FOLDER / "batches.npz").items() if key.startswith(name + "/")
    }
    file, numbers = BATCHES[name]
    config = config_of(name, recorded)
    loader = loader_of(MecovqaSource(str(FOLDER / file)), config)
    arrays, notices = loader.load_eval(numbers, (0, 1), question=False)
    width, first = config.compressed_tokens or MODEL.clip.num_patches, 7 * (config.compressed_tokens or 16) + 1
    starts = [i * width for i in range(7)] + [
        first + i * config.mask_tokens for i in range(6 * bool(config.mask_tokens))
    ]
    assert not notices
    for row in (0, 1):
        kept = recorded["input_ids"][row] != 0
        ids, labels = collapsed(arrays, row, starts)
        assert ids == recorded["input_ids"][row][kept].tolist() and labels == recorded["labels"][row][kept].tolist()
        clip = recorded[f"clip_{row}"]
        np.testing.assert_array_equal(arrays["clip_pixels"][row, : len(clip)], clip)
        assert not arrays["clip_pixels"][row, len(clip) :].any()
        np.testing.assert_array_equal(arrays["sam_box"][row, 2:], recorded["resize"][row])
        if config.mask_tokens:
            masks = recorded[f"masks_{row}"]
            np.testing.assert_array_equal(arrays["example_masks"][row, : len(masks)], masks)
        assert arrays["mask_valid"][row].tolist() == [True]
    assert ("example_masks" in arrays) == bool(config.mask_tokens)
    with np.load(FOLDER / "preprocess.npz"):
        target = images.load_mask(str(FOLDER / loader.record(numbers[0]).target_mask), arrays["mask_size"][0])
    np.testing.assert_array_equal(arrays["gt_masks"][0, 0, : target.shape[0], : target.shape[1]], target)


def write_mask(path, pixels):
    Image.fromarray(np.uint8(pixels)).save(path)


@pytest.mark.parametrize("masks", ["overlay", "separate"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "b_mask.png").unlink(), "file is missing; expected .*b_mask.png"),
        (
            lambda folder: shutil.copy(folder / "a_mask.png", folder / "b_mask.png"),
            r"mask and picture differ in size \(.*b_mask.png\); expected 220 x 130 \(h x w\), found 150 x 210",
        ),
        (
            lambda folder: write_mask(folder / "b_mask.png", np.zeros((220, 130))),
            r"mask of an example is empty \(.*b_mask.png\); expected at least one pixel, found none",
        ),
    ],
)
def test_examples_that_cannot_be_shown_are_named(tmp_path, masks, spoil, message):
    folder = tmp_path / "data"
    shutil.copytree(FOLDER, folder)
    spoil(folder)
    loader = loader_of(MecovqaSource(str(folder / "items.json")), IclConfig(masks))
    with pytest.raises(DataError, match=f"record 0.*{message}"):
        loader.load_eval([0, -1], (0,), question=False)


def test_a_text_of_ones_own_may_ask_for_several_targets():
    """Each `<SEG>` of the answer has a mask of the picture in question; the examples have none."""
    answer = "The organ <SEG><mask>a_mask.png</mask> and its rest <SEG><mask>a_mask.png</mask>."
    asked = "Where it is in <image>, find the organ and its rest here: <image>"
    conversations = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
    loader = loader_of([parse(CASES[0]["record"] | {"conversations": conversations})], IclConfig(), max_masks=2)
    arrays, _ = loader.load_eval([0], (0,), question=False)
    assert arrays["mask_valid"][0].tolist() == [True, True] and (arrays["seg_position"][0] > 0).all()
    assert (arrays["feature_index"][0] >= 0).sum() == 2 * MODEL.clip.num_patches


def test_a_row_with_examples_is_shared_with_no_other(tmp_path):
    """A conversation without a mask could be packed; its examples could not."""
    talk = [{"from": "human", "value": "<examples>Query: <image>"}, {"from": "gpt", "value": "Seen."}]
    raw = CASES[0]["record"] | {"conversations": talk}
    loader = loader_of([parse(raw), parse(raw)], IclConfig(), pack=True)
    plan, problems = loader.plan(seed=0)
    assert not problems and [len(plan.records(number)) for number in (0, 1)] == [1, 1]


def test_examples_count_in_what_stands_for_the_records(tmp_path):
    source = [parse(CASES[1]["record"]), parse(CASES[1]["record"])]
    source[1] = icl.with_examples(source[1], source[1].examples[:1])
    assert digest(source, [0]) != digest([source[1]], [0])
    shown = [len(icl.views(icl.with_examples(source[0], source[0].examples[:k]), IclConfig())) for k in range(4)]
    assert shown == [1, 2, 3, 4]
