"""How much faster answers come with many slots than one at a time, and with refilled slots than in static batches.

COMMAND
    python -m medplib_jax.benchmarks.decode_batching

A tiny mixture of experts with random weights answers random prompts; the lengths of the answers are given: all `--long` tokens, and
`mixed`, exponentially distributed as those of mixed tasks are (many of a word or two, a few of up to `--longest`). The same answers are made in
every way, interleaved; the fastest of `--repeat` runs counts. Prints a table and the ratios.
"""

import argparse
import dataclasses
import functools
import json
import time

import numpy as np

from configs import common
from medplib_jax.batch import Batch
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.stream import lanes_for, stream_answers
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB

NEVER = -1  # no token: answers end at their limit
WAYS = {"one at a time": (1, 1), "static batches": (16, 16), "refilled slots": (16, 8)}  # (slots, refill)


def random_prompts(model, count: int, length: int, seed: int) -> Batch:
    """`count` prompts of up to `length` positions about one picture each."""
    rng = np.random.default_rng(seed)
    patches, clip, sam = model.clip.num_patches, model.clip.image_size, model.mask.image_size
    valid = np.arange(length) < rng.integers(length // 2 + patches // 2, length + 1, (count, 1))
    feature_index = np.full((count, length), -1, np.int32)
    feature_index[:, 1 : 1 + patches] = np.arange(patches)
    return Batch(
        tokens=rng.integers(3, model.llm.vocab_size, (count, length)).astype(np.int32) * valid,
        valid=valid,
        targets=np.zeros((count, length), np.int32),
        loss_weights=np.zeros((count, length), np.float32),
        feature_index=feature_index,
        clip_pixels=rng.integers(0, 256, (count, 1, clip, clip, 3)).astype(np.uint8),
        sam_pixels=rng.integers(0, 256, (count, sam, sam, 3)).astype(np.uint8),
        sam_box=np.tile(np.array([0, 0, sam, sam], np.int32), (count, 1)),
        region_points=np.zeros((count, 0, 1, 2), np.float32),
        region_point_valid=np.zeros((count, 0, 1), bool),
        region_image=np.zeros((count, 0), np.int32),
        seg_position=np.zeros((count, 0), np.int32),
        mask_valid=np.zeros((count, 0), bool),
        gt_masks=np.zeros((count, 0, 1, 1), np.uint8),
        mask_size=np.ones((count, 2), np.int32),
        record=np.arange(count, dtype=np.int32),
    )


def measure(prompts: Batch, lengths: np.ndarray, generator: Generator, repeat: int) -> dict[str, float]:
    """{way: seconds} for answers of these lengths. All ways must give the same answers."""
    limits = dict(enumerate(lengths.tolist()))

    def answers(slots, refill):
        made = stream_answers(
            generator, [prompts], slots=slots, refill=refill, lanes=lanes_for(generator.params, slots), limits=limits
        )
        return {int(row.record[0]): generation.tokens[0, : generation.lengths[0]].tolist() for row, generation in made}

    expected = {way: answers(*sizes) for way, sizes in WAYS.items()}  # compiles, too
    for way, found in expected.items():
        differing = [record for record, tokens in found.items() if tokens != expected["one at a time"][record]]
        if differing:
            raise ValueError(f"{way}: answers {differing} differ from those made one at a time")
    seconds = {way: [] for way in WAYS}
    for _ in range(repeat):
        for way, sizes in WAYS.items():
            start = time.perf_counter()
            answers(*sizes)
            seconds[way].append(time.perf_counter() - start)
    return {way: min(values) for way, values in seconds.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=96, help="positions, 64 of them of the picture")
    parser.add_argument("--long", type=int, default=128, help="tokens of each answer where all are alike")
    parser.add_argument(
        "--longest",
        type=int,
        default=256,
        help="tokens of the longest answer where they are mixed; four times the mean",
    )
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    count, longest = arguments.requests, arguments.longest
    model = dataclasses.replace(common.TINY, moe=common.EXPERTS)
    prompts = random_prompts(model, count, arguments.prompt, seed=0)
    params = draw_params(abstract_module(functools.partial(MedPLIB, model)), 0)
    mixed = np.clip(np.random.default_rng(1).exponential(longest / 4, count), 1, longest).astype(int)
    ratios = {}
    for name, lengths in {"long": np.full(count, arguments.long), "mixed": mixed}.items():
        generator = Generator(model, params, eos_id=NEVER, seg_id=NEVER, max_new_tokens=int(lengths.max()), max_masks=0)
        found = measure(prompts, lengths, generator, arguments.repeat)
        for way, seconds in found.items():
            print(
                f"{name:6} {way:16} slots {WAYS[way][0]:3} refill {WAYS[way][1]:3} {seconds:8.2f} s {lengths.sum() / seconds:8.0f} tokens/s"
            )
        one, static, refilled = found.values()
        ratios |= {f"{name}.slots_over_one": one / refilled, f"{name}.refilled_over_static": static / refilled}
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
