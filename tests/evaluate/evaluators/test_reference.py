"""The protocol `reference` against what the original program computed: its prompts, its answers, and the mask it draws
in each case.
"""

import numpy as np
import pytest

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.masks import mask_drawer
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.stream import stream_answers
from medplib_jax.evaluate.evaluators.reference import TEMPLATE, UNPAD, ReferenceLoader
from medplib_jax.models.masks.unpad import resample_to_canvas
from tests.convert.golden_batch import CLIP_MEAN, CLIP_STD, golden_batch
from tests.convert.test_parity import CONFIG, converted, recorded  # noqa: F401 (fixtures)
from tests.paths import GOLDEN

GROUNDING = ("<image>\nPlease segment the liver in this image.", "Sure, it is <SEG>.<mask>a_mask.png</mask>")
REGION = (
    "<image>\nDescribe <region>c_mask.png</region> in this image, please.",
    "The region shows a mass with irregular border.",
)


@pytest.fixture(scope="module")
def evaluated() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / "evaluate_56.npz"))


@pytest.fixture(scope="module")
def loader() -> ReferenceLoader:
    data = DataConfig(template=TEMPLATE, bucket_lengths=(256,), max_regions=1, max_masks=1)
    return ReferenceLoader([[]], Tokenizer.load(str(GOLDEN / "tokenizer")), data, CONFIG)


def record(question, answer):
    return Record("golden", 0, "/", ("a.png",), (("human", question), ("gpt", answer)))


def spliced(ids):
    """Recorded ids with the picture's positions, and without the region's, which the original deletes when it gets no
    regions.
    """
    return [token for i in ids for token in ([0] * CONFIG.clip.num_patches if i == -200 else [] if i == -300 else [i])]


def test_the_prompt_ends_at_the_last_colon(loader, evaluated):
    asked = loader.encode(record(*GROUNDING), question=True)
    assert asked.tokens.tolist() == spliced(evaluated["input_ids"][0].tolist())
    assert asked.answer == "Sure, it is <SEG>." and asked.masks == ("a_mask.png",)
    leaking = loader.encode(record(GROUNDING[0], "Here it is: <SEG>.<mask>a_mask.png</mask>"), question=True)
    assert (
        len(leaking) > len(asked) and leaking.tokens[-1] == asked.tokens[-1]
    )  # a colon of the answer: what stands before it is given away


def test_regions_are_left_out(loader, evaluated):
    asked = loader.encode(record(*REGION), question=True)
    assert asked.tokens.tolist() == spliced(evaluated["region_input_ids"][0].tolist()) and asked.regions == ()
    assert asked.feature_index.max() == CONFIG.clip.num_patches - 1
    right = Loader([[]], loader.tokenizer, DataConfig(template=TEMPLATE, bucket_lengths=(256,)), CONFIG).encode(
        record(*REGION), question=True
    )
    assert len(right) == len(asked) + 1


@pytest.mark.parametrize("case", ["noseg", "seg", "history", "noregion"])
def test_answers_and_masks_are_the_originals(case, converted, recorded, evaluated):  # noqa: F811
    embedding, rows = np.zeros((667, 64), np.float32), evaluated["embed_rows"]
    embedding[rows] = evaluated["embed_values"]
    head = recorded["weights/lm_head.weight"].copy()
    if case in ("seg", "history"):  # so that it says <SEG> at all
        head[converted.seg_id], head[Tokenizer.eos_id] = (
            evaluated["seg_lm_head_row_seg"],
            evaluated["seg_lm_head_row_eos"],
        )
    model = converted.with_tensors({"model.embed_tokens.weight": embedding, "lm_head.weight": head})
    generator = Generator(
        model.config,
        model.params,
        DecodeOptions(max_new_tokens=16, max_masks=1, original_masks=True),
        stop_ids=Tokenizer.stop_ids,
        seg_id=model.seg_id,
    )
    ids = evaluated[{"history": "history_prompt_ids", "noregion": "region_input_ids"}.get(case, "input_ids")]
    prompt = prompt_batch(
        ids, evaluated["region_clip_uint8" if case == "noregion" else "clip_uint8"], evaluated, model.seg_id
    )
    ((_, made),) = stream_answers(generator, [prompt], slots=2, refill=1)
    expected = evaluated[f"{case}_output_ids"][0, ids.shape[1] :].tolist()
    assert made.tokens[0, : made.lengths[0]].tolist() == [token for token in expected if token != Tokenizer.eos_id]
    if case == "noregion":
        return
    assert made.mask_valid.tolist() == [[True]]
    height, width = evaluated["original_size"]
    logits, _ = resample_to_canvas(
        made.mask_logits, prompt.sam_box, prompt.mask_size, canvas=(height, width), sam_size=256, mode=UNPAD
    )
    np.testing.assert_allclose(logits[0, 0, ::3, ::3], evaluated[f"{case}_pred_mask"][0], rtol=1e-3, atol=1e-3)
    drawn = mask_drawer(256, UNPAD, 256, 0.1)(prompt, made)[0, 0, :height, :width]
    probability = 1 / (1 + np.exp(-np.float64(evaluated[f"{case}_pred_mask"][0])))
    clear = np.abs(probability - 0.1) > 1e-3
    np.testing.assert_array_equal(drawn[::3, ::3][clear], (probability > 0.1)[clear])


def prompt_batch(ids, clip_uint8, evaluated, seg_id) -> Batch:
    pixels = (clip_uint8 / np.float32(255) - np.float32(CLIP_MEAN)) / np.float32(CLIP_STD)
    z = {"input_ids": ids, "attention_mask": np.ones_like(ids), "images_clip": pixels.transpose(0, 3, 1, 2)}
    batch = golden_batch(z, seg_id, CONFIG.clip.num_patches)
    size = np.array([evaluated["original_size"]], np.int32)
    return batch.replace(sam_pixels=evaluated["sam_pixels"], sam_box=evaluated["sam_box"], mask_size=size)
