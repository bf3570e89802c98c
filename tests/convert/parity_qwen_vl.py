"""The recorded fixtures of Qwen-VL and BiRD (`golden/qwen_vl`): which file is compared how, with which weights."""

import functools
from collections.abc import Callable, Iterator

from medplib_jax.data.qwen_tokenizer import QwenTokenizer
from tests.convert import qwen_vl_checks as checks
from tests.convert import qwen_vl_text_checks as text_checks
from tests.convert.checks import Row
from tests.convert.golden_folder import ELSEWHERE, Golden, compares
from tests.convert.qwen_vl_checks import SPAN, Fixture

ELSEWHERE.update(
    {
        "ckpt_q16/*": "weights of other fixtures",
        "ckpt_q256/*": "weights of other fixtures",
        "ckpt_box/*": "weights of other fixtures",
        "generate_q16.json": "texts of generate_q16.npz",
        "bird/metrics.json": "extract_information: tests/data/test_qwen_text.py; the scores are not compared yet",
        "trainable_fix_vit.json": "what opt_steps.npz trains",
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
_with_weights("ntk_logn.npz", "ckpt_q16", checks.check_long_context)
_with_weights("generate_q16.npz", "ckpt_q16", checks.check_generation)
_with_weights("bird/packed_q16.npz", "ckpt_q16", checks.check_packed)
_with_weights("bird/eval_box.json", "ckpt_box", checks.check_answers)


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
def training_examples(golden: Golden, file: str) -> Iterator[Row]:
    yield from text_checks.check_examples(golden.json(file), QwenTokenizer.load(str(golden.path("ckpt_q16")), SPAN))


@compares("opt.json")
def rates(golden: Golden, file: str) -> Iterator[Row]:
    yield from checks.check_rates(golden.json(file))


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
