"""How much faster answers come with many slots than one at a time, and with refilled slots than in static batches.

A tiny mixture of experts with random weights answers random prompts, and the lengths of the answers are given. `long`:
all alike. `mixed`: exponentially distributed, as those of mixed tasks are: many of a word or two, a few long ones.
"""

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.benchmarks.decoding import NO_TOKEN
from medplib_jax.benchmarks.measure import Table, interleave
from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.decode.stream import lanes_for, stream_answers
from medplib_jax.models.layers import draw_params
from medplib_jax.train.step import abstract_model

WAYS = {"one at a time": (1, 1), "static batches": (16, 16), "refilled slots": (16, 8)}  # (slots, refill)
LONG, LONGEST = 128, 256  # tokens of each answer where all are alike; of the longest where they are mixed


def measure(config: ExperimentConfig, rounds: int) -> Table:
    """A row per kind of lengths and way; as many answers as the config's batch has rows.

    ValueError when two ways answer differently.
    """
    requests = config.data.batch_size
    params, prompts = draw_params(abstract_model(config.model), 0), example_batch(config)
    mixed = np.clip(np.random.default_rng(1).exponential(LONGEST / 4, requests), 1, LONGEST).astype(int)
    table = Table(f"{requests} answers in slots", ("answers", "", "fastest s", "tokens/s"))
    for kind, lengths in {"long": np.full(requests, LONG), "mixed": mixed}.items():
        generator = Generator(
            config.model,
            params,
            DecodeOptions(max_new_tokens=int(lengths.max()), max_masks=0),
            stop_ids=(NO_TOKEN,),
            seg_id=NO_TOKEN,
        )
        found = _seconds(prompts, lengths, generator, rounds)
        table.rows += [(kind, way, f"{value:.2f}", f"{lengths.sum() / value:.0f}") for way, value in found.items()]
        one, static, refilled = found.values()
        table.flat |= {f"{kind}.slots_over_one": one / refilled, f"{kind}.refilled_over_static": static / refilled}
    return table


def _seconds(prompts: Batch, lengths: np.ndarray, generator: Generator, rounds: int) -> dict[str, float]:
    """{way: seconds of the fastest round}."""
    limits = dict(enumerate(lengths.tolist()))

    def answers(slots: int, refill: int) -> dict[int, list[int]]:
        lanes = lanes_for(generator.params, slots)
        made = stream_answers(generator, [prompts], slots=slots, refill=refill, lanes=lanes, limits=limits)
        return {int(row.record[0]): generation.tokens[0, : generation.lengths[0]].tolist() for row, generation in made}

    runs = {way: (lambda sizes=sizes: answers(*sizes)) for way, sizes in WAYS.items()}
    one, *others = (run() for run in runs.values())  # compiles, too
    if any(found != one for found in others):
        raise ValueError("answers made in slots differ from those made one at a time")
    return {way: samples.fastest for way, samples in interleave(runs, rounds).items()}
