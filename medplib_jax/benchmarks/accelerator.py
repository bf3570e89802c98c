"""What one accelerator is used for: its measured rates, model FLOPs utilisation of the step, share of the memory bandwidth in decoding."""

import time

import jax
import jax.numpy as jnp

from medplib_jax.aot.flops import model_flops
from medplib_jax.benchmarks import decoding, parts, training, workload
from medplib_jax.benchmarks.measure import Table
from medplib_jax.config import ModelConfig
from medplib_jax.experiment import ExperimentConfig
from medplib_jax.models.layers import params_of
from medplib_jax.optim import flatten
from medplib_jax.train_step import abstract_model


def measure(model: ModelConfig, batch: int, against: bool, rounds: int, new_tokens: int, device: str) -> list[Table]:
    """Stage IV and III beside the peer with MFU, mixture beside MLP, parts of the step, and answers at batch 1 and 16."""
    rates = machine_rates(width=model.llm.hidden_size)
    tables = [rates]
    for stage in ("IV", "III"):
        config = workload.experiment(model, batch, stage)
        name = f"train_step.stage_{stage}"
        table = training.compare(config, ("torch eager", "torch compile") if against else (), rounds, device, name)
        flops = model_flops("train", config, jax.devices()[0], batch, config.data.bucket_lengths[-1])
        table.flat[f"{name}.mfu"] = flops / table.flat[f"{name}.ours.seconds"] / rates.flat["machine.matmul_flops"]
        table.title += f", stage {stage}: {100 * table.flat[f'{name}.mfu']:.0f} % of the measured matmul rate"
        tables.append(table)
    config = workload.experiment(model, batch)
    tables += [training.moe_over_dense(config, rounds), parts.measure(config, rounds)]
    for rows in (1, 16):
        config = workload.merged(workload.experiment(model, rows))
        first, answers = decoding.compare(config, against, rounds, new_tokens, device=device)
        if rows == 1:
            step = (answers.flat["decode.batch_1.ours.seconds"] - first.flat["first_token.batch_1.ours.seconds"]) / max(new_tokens - 1, 1)
            answers.flat["decode.batch_1.bandwidth_share"] = active_bytes(config) / rates.flat["machine.bytes_per_second"] / step
        tables += [first, answers]
    return tables


def machine_rates(width: int) -> Table:
    """The rate of one large bfloat16 product, and of a copy, which is what decoding is bound by."""
    matrix, array = jnp.ones((2 * width, 4 * width), jnp.bfloat16), jnp.ones(2**14 * width, jnp.bfloat16)
    product, copy = _seconds(lambda x: x @ x.T, matrix), _seconds(lambda x: x + 1, array)
    flat = {"machine.matmul_flops": 2 * (2 * width) ** 2 * 4 * width / product, "machine.bytes_per_second": 2 * array.nbytes / copy}
    rows = [("bfloat16 product", f"{flat['machine.matmul_flops'] / 1e12:.1f} TFLOP/s"), ("memory", f"{flat['machine.bytes_per_second'] / 1e9:.0f} GB/s")]
    return Table(f"Rates of {jax.devices()[0].device_kind}", ("", "measured"), rows, flat)


def _seconds(run, x, repeats: int = 10) -> float:
    """The fastest of some runs."""
    program = jax.jit(run)
    program(x).block_until_ready()
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        program(x).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return best


def active_bytes(config: ExperimentConfig) -> float:
    """Bytes of weights that one token of one answer has to read: the decoder with the chosen experts, and the head."""
    model, total = config.model, 0.0
    for path, leaf in flatten(params_of(abstract_model(model))).items():
        if path.startswith("llm/") and not path.startswith("llm/embed/"):
            total += leaf.size * (model.moe.top_k / model.moe.num_experts if "/experts/" in path else 1)
    return total * jnp.dtype(model.dtype).itemsize
