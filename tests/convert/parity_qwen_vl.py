"""The recorded fixtures of Qwen-VL and BiRD (`golden/qwen_vl`): which file is compared how, with which weights."""

import functools
from collections.abc import Callable, Iterator

from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from tests.convert import qwen_vl_checks as checks
from tests.convert import qwen_vl_decoding_checks as decoding_checks
from tests.convert import qwen_vl_metric_checks as metric_checks
from tests.convert import qwen_vl_text_checks as text_checks
from tests.convert.checks import Row
from tests.convert.golden_folder import ELSEWHERE, NOT_COMPARED, Golden, compares
from tests.convert.qwen_vl_checks import SPAN, Fixture

ELSEWHERE.update(
    {
        "ckpt_*/*": "weights of other fixtures",
        "lora/*/*": "weights of lora/lora.npz",
        "data/medgrit_*.json": "questions of bird/eval_box.json",
        "data/*.png": "pictures of other fixtures",
    }
)
NOT_COMPARED.update(
    {
        ("*", "*_margin"): "how far apart the two best of the scores are, which are compared",
        ("*", "gradrow/*"): "which rows of a gradient are stored",
        ("bird/bird.json", "chat_template_assumed"): "a template; what it renders is compared",
        ("bird/bird.json", "paddle_from_list_format"): "Paddle's slip, a space too few; Med-GRIT's questions have it",
        ("bird/bird.json", "processor_cases/*/error"): "the original fails; what asks here writes ChatML itself",
        ("bird/metrics.json", "METEOR, mBMR"): "compared where there are Java and the extra caption (METEOR 1.5)",
        ("bird/metrics.json", "CIDEr"): "no figure of BiRD's tables, not computed",
        ("bird/metrics.json", "SPICE"): "null in the recording",
        ("bird/metrics.json", "edge"): "but for one modality: what the original crashes on is scored here",
    }
)


@functools.lru_cache(maxsize=2)  # several checks in a row read the same weights
def weights(golden: Golden, name: str) -> Fixture:
    golden.path(name)
    return Fixture.load(golden.folder, name, span=256 if name == "ckpt_q256" else SPAN)


def _with_weights(file: str, name: str, check: Callable, *arguments) -> None:
    def run(golden: Golden, file: str) -> Iterator[Row]:
        read = golden.json if file.endswith(".json") else golden.arrays
        yield from check(weights(golden, name), read(file), *arguments)

    compares(file)(run)


_with_weights("visual_q16.npz", "ckpt_q16", checks.check_visual)
_with_weights("visual_q256.npz", "ckpt_q256", checks.check_visual, 16)
_with_weights("forward_q16.npz", "ckpt_q16", checks.check_forward)
_with_weights("forward_q16_text.npz", "ckpt_q16", checks.check_forward)
_with_weights("forward_q256.npz", "ckpt_q256", checks.check_forward)
_with_weights("ntk_logn.npz", "ckpt_q16", decoding_checks.check_long_context)
_with_weights("generate_q16.npz", "ckpt_q16", decoding_checks.check_generation)
_with_weights("bird/packed_q16.npz", "ckpt_q16", checks.check_packed)
_with_weights("trainable_fix_vit.json", "ckpt_q16", checks.check_trainable)


@compares("pos_tables.npz")
def position_tables(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_position_tables(golden.arrays(file))


@compares("preprocess.npz")
def pictures(golden: Golden, file: str) -> Iterator[Row]:
    golden.path("data/ct_a.png")
    yield from checks.check_pictures(golden.folder, golden.arrays(file))


@compares("conversation.json")
def conversation(golden: Golden, file: str) -> Iterator[Row]:
    cases, folder = golden.json(file), str(golden.path("ckpt_q16"))
    for name, span in (("span_16", SPAN), ("span_256", 256)):
        yield from text_checks.check_text(cases[name], QwenTokenizer.load(folder, span))
    yield from text_checks.check_boxes(cases["boxes"])


@compares("bird/bird.json")
def training_and_inference(golden: Golden, file: str) -> Iterator[Row]:
    cases, fixture = golden.json(file), weights(golden, "ckpt_q16")
    yield from text_checks.check_examples(cases, fixture.tokenizer)
    yield from checks.check_frozen(fixture, cases)
    yield from decoding_checks.check_raw_batches(fixture, cases["infer_generate"])


@compares("bird/metrics.json")
def scores(golden: Golden, file: str) -> Iterator[Row]:
    yield from metric_checks.check_scores(golden.json(file))


@compares("bird/eval_box.json")
def answers(golden: Golden, file: str) -> Iterator[Row]:
    cases = golden.json(file)
    yield from decoding_checks.check_answers(weights(golden, "ckpt_box"), cases)
    yield from metric_checks.check_responses(cases)


@compares("generate_q16.json")
def texts_of_answers(golden: Golden, file: str) -> Iterator[Row]:
    z, tokenizer = golden.arrays("generate_q16.npz"), weights(golden, "ckpt_q16").tokenizer
    yield from decoding_checks.check_texts(tokenizer, golden.json(file), z)


@compares("opt.json")
def optimizer_settings(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_settings(weights(golden, "ckpt_q16"), golden.json(file))


@compares("opt_steps.npz")
def optimizer(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_optimizer(
        weights(golden, "ckpt_q16"), golden.arrays(file), golden.arrays("forward_q16.npz")
    )


@compares("lora/lora.npz")
def adapters(golden: Golden, file: str) -> Iterator[Row]:
    for needed in ("ckpt_q16", "ckpt_q256", "lora/chat", "lora/chat_st", "lora/base"):
        golden.path(needed)
    yield from checks.check_adapters(golden.folder, golden.arrays(file))


@compares("lora/keys.json")
def adapter_names(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_adapter_names(golden.json(file))


@compares("keys_qwen_vl_7b.json")
def names(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_names(golden.json(file))
