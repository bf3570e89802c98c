"""How answers of converted weights are compared with those that the original program gave."""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.language.llama import init_cache
from medplib_jax.models.layers import bind
from medplib_jax.models.masks.unpad import resample_to_canvas
from tests.convert.checks import Arrays, Converted, Row, differing, prompt, relative
from tests.convert.golden_batch import SAM_SIDE


def check_generation(converted: Converted, z: Arrays) -> Iterator[Row]:
    """Greedy answers of 16 tokens."""
    generator = Generator(
        converted.config,
        converted.params,
        DecodeOptions(max_new_tokens=16, max_masks=0),
        stop_ids=Tokenizer.stop_ids,
        seg_id=converted.seg_id,
    )
    for name in sorted(key.removesuffix("_output_ids") for key in z if key.endswith("_output_ids")):
        item = prompt(z, name.removesuffix("_noregion") + "_")
        if name.endswith("_noregion"):
            item.pop("valid_region")
        made = generator(converted.batch(item))
        yield Row(
            "generated ids (share that differs)", _answer_differs(made, z[name + "_output_ids"], item["input_ids"]), 0.0
        )


def check_noisy_generation(converted: Converted, z: Arrays) -> Iterator[Row]:
    """Top-2 routing draws noise in evaluation too, anew at every step; here with the original's draws."""
    model, layers, experts = converted.model(), converted.config.moe_layers, converted.config.moe.num_experts

    @jax.jit
    def run(params, x, cache, noise):
        bound = bind(model, params)
        hidden, out = bound.llm(x, jnp.ones(x.shape[:2], bool), cache=cache, router_noise=noise)
        logits = bound.llm.logits(hidden[:, -1])
        return logits, bound.llm.embed(logits.argmax(-1)[:, None]), out["cache"]

    for name in sorted(key.removesuffix("_output_ids") for key in z if key.endswith("_output_ids")):
        x, _ = jax.jit(lambda params, batch: bind(model, params).embed(batch))(
            converted.params, converted.batch(prompt(z, name + "_"))
        )
        cache, steps = init_cache(converted.config, 1, x.shape[1] + 16, jnp.float32), []
        for _ in range(16):
            draws = [
                np.random.RandomState(1000 * 51 + 7 * layer + 2).gumbel(size=(x.shape[1], experts)) for layer in layers
            ]
            logits, x, cache = run(converted.params, x, cache, np.float32(draws))
            steps.append(np.asarray(logits)[0])
        yield Row("logits of every step", relative(np.stack(steps)[None], z[name + "_step_logits"]))
        expected = z[name + "_output_ids"][0, z[name + "_input_ids"].shape[1] :]
        yield Row("generated ids (share that differs)", differing(np.argmax(steps, -1), expected), 0.0)


def _answer_differs(made, output_ids, prompt_ids) -> float:
    expected = output_ids[0, prompt_ids.shape[1] :]
    ended = np.flatnonzero(expected == Tokenizer.eos_id)
    expected = expected[: ended[0]] if len(ended) else expected
    return differing(np.asarray(made.tokens)[0, : int(made.lengths[0])], expected)


def check_evaluate(converted: Converted, z: Arrays) -> Iterator[Row]:
    """Answers with and without `<SEG>`, and the mask of the first one. Recorded with two rows of lm_head exchanged, so
    that it speaks of `<SEG>` at all. Masks that the original draws without one, or for one in the prompt, are its
    quirks and are left out."""
    speaking = converted.with_tensors({"lm_head.weight": speaking_head(converted, z)})
    for name, chosen, ids in (
        ("noseg", converted, "input_ids"),
        ("seg", speaking, "input_ids"),
        ("history", speaking, "prompt_ids"),
        ("region", speaking, "input_ids"),
    ):
        if name + "_output_ids" not in z:
            continue
        own = name + "_" if name in ("history", "region") else ""
        item = prompt(z, own, ids)
        size = z["region_original_size" if name == "region" else "original_size"]
        yield from _check_answer(chosen, z, name, item, size, draws=name != "history")


def check_examples_evaluated(recorded: Converted, z: Arrays) -> Iterator[Row]:
    """`check_evaluate` of prompts with examples; the arrays of a prompt begin with its number."""
    for number in sorted({key.split("_")[0] for key in z if key.endswith("_input_ids")}):
        item = {key.removeprefix(f"{number}_"): z[key] for key in z if key.startswith(f"{number}_")}
        converted = recorded.with_examples(item)
        speaking = converted.with_tensors({"lm_head.weight": speaking_head(converted, item)})
        for name, chosen in (("noseg", converted), ("seg", speaking)):
            yield from _check_answer(chosen, item, name, item, item["original_size"], draws=True)


def speaking_head(converted: Converted, z: Arrays) -> np.ndarray:
    """The head with which the original was made to say `<SEG>`, then to end."""
    head = np.array(converted.params["llm"]["head"]["kernel"]).T
    head[converted.seg_id], head[Tokenizer.eos_id] = z["seg_lm_head_row_seg"], z["seg_lm_head_row_eos"]
    return head


def _check_answer(chosen: Converted, z: Arrays, name: str, item: Arrays, size, draws: bool) -> Iterator[Row]:
    """The greedy answer to the prompt `item`, and with `draws` the mask of its first <SEG>."""
    rows, columns = (int(side) for side in size)
    batch = chosen.batch(item).replace(mask_size=np.int32([[rows, columns]]))
    generator = Generator(
        chosen.config,
        chosen.params,
        DecodeOptions(max_new_tokens=16, max_masks=1),
        stop_ids=Tokenizer.stop_ids,
        seg_id=chosen.seg_id,
    )
    made = generator(batch)
    expected = z[name + "_output_ids"]
    yield Row("generated ids (share that differs)", _answer_differs(made, expected, item["input_ids"]), 0.0)
    if draws and chosen.seg_id in expected[0, item["input_ids"].shape[1] :]:
        masks, _ = resample_to_canvas(
            made.mask_logits,
            batch.sam_box,
            batch.mask_size,
            canvas=(rows, columns),
            sam_size=SAM_SIDE,
            mode="reference",
        )
        yield Row("masks of answers", relative(masks[0], z[name + "_pred_mask"]))
        if name + "_low_res_mask" in z:
            yield Row("mask logits of answers", relative(made.mask_logits[0], z[name + "_low_res_mask"][0]))
            yield Row("predicted IoU of answers", relative(made.predicted_iou[0], z[name + "_iou"][0]))
