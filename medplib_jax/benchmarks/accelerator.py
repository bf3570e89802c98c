"""How well one accelerator is used: MFU of the step, share of the bandwidth in decoding, its measured rates."""

import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from medplib_jax.aot.flops import model_flops
from medplib_jax.batch import flatten
from medplib_jax.benchmarks import decoding, training
from medplib_jax.benchmarks.measure import Table
from medplib_jax.benchmarks.workload import Rival, example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.layers import params_of
from medplib_jax.train.step import abstract_model

REPEATS = 10


def training_step(config: ExperimentConfig, stage: str, rival: Rival | None, rounds: int) -> Table:
    """The step with its model FLOPs utilisation: of the measured rate, not of what the maker names."""
    name = f"train_step.stage_{stage}"
    table = training.compare(config, rival, rounds, name)
    labelled = int((example_batch(config).loss_weights > 0).sum(1).max())
    rows, length = config.data.batch_size, config.data.bucket_lengths[-1]
    flops = model_flops("train", config, jax.devices()[0], rows, length, labelled)
    rate = machine_rates(config.model.llm.hidden_size).flat["machine.matmul_flops"]
    table.flat[f"{name}.mfu"] = flops / table.flat[f"{name}.ours.seconds"] / rate
    table.title += f", stage {stage}: {100 * table.flat[f'{name}.mfu']:.0f} % of the measured matmul rate"
    return table


def answers(config: ExperimentConfig, rival: Rival | None, rounds: int, new_tokens: int) -> list[Table]:
    """Answers beside the rival's, and how much of the bandwidth a single one uses.

    That is the share that reading the active weights takes, per token after the first.
    """
    first, whole = decoding.compare(config, rival, rounds, new_tokens)
    if config.data.batch_size == 1:  # the experts of several rows differ
        seconds = whole.flat["decode.batch_1.ours.fastest_seconds"]
        step = (seconds - first.flat["first_token.batch_1.ours.fastest_seconds"]) / max(new_tokens - 1, 1)
        rate = machine_rates(config.model.llm.hidden_size).flat["machine.bytes_per_second"]
        whole.flat["decode.batch_1.bandwidth_share"] = active_bytes(config) / rate / step
    return [first, whole]


@functools.cache
def machine_rates(width: int) -> Table:
    """The measured rates of a large bfloat16 product and of a copy, which bounds decoding.

    The factors are random numbers: with equal ones a GPU saves power and is faster.
    """
    matrix, array = (
        jax.random.normal(jax.random.key(0), (2 * width, 4 * width), jnp.bfloat16),
        jnp.ones(2**14 * width, jnp.bfloat16),
    )
    product, copy = fastest(lambda x: x @ x.T, matrix), fastest(lambda x: x + 1, array)
    flat = {
        "machine.matmul_flops": 2 * (2 * width) ** 2 * 4 * width / product,
        "machine.bytes_per_second": 2 * array.nbytes / copy,
    }
    rows = [
        ("bfloat16 product", f"{flat['machine.matmul_flops'] / 1e12:.1f} TFLOP/s"),
        ("memory", f"{flat['machine.bytes_per_second'] / 1e9:.0f} GB/s"),
    ]
    return Table(f"Rates of {jax.devices()[0].device_kind}", ("", "measured"), rows, flat)


def fastest(run: Callable, *arguments: jax.Array) -> float:
    """Seconds of the fastest of some runs."""
    program = jax.jit(run)
    jax.block_until_ready(program(*arguments))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(program(*arguments))
        best = min(best, time.perf_counter() - start)
    return best


def active_bytes(config: ExperimentConfig) -> float:
    """Bytes of weights that one token of one answer has to read: the decoder with the chosen experts, and the head."""
    model, total = config.model, 0.0
    for path, leaf in flatten(params_of(abstract_model(model))).items():
        if path.startswith("llm/") and not path.startswith("llm/embed/"):
            total += leaf.size * (model.moe.top_k / model.moe.num_experts if "/experts/" in path else 1)
    return total * jnp.dtype(model.dtype).itemsize
