"""Prefill and a fixed number of greedy tokens, beside the same in PyTorch."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from medplib_jax.benchmarks.measure import Table, interleave, side_by_side
from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.models.layers import draw_params
from medplib_jax.train.step import abstract_model

NO_TOKEN = -1  # as end and <SEG>: every answer has full length, and no masks are drawn


def compare(
    config: ExperimentConfig,
    against: bool,
    rounds: int,
    new_tokens: int,
    quantize: Sequence[str] = ("", "int8"),
    device: str = "cpu",
) -> list[Table]:
    """Time to the first token, and tokens per second of prefill and `new_tokens` tokens together, for the batch size of the config."""
    rows = config.data.batch_size
    tables = []
    for title, tokens, name in (
        ("first token", 1, "first_token"),
        (f"prefill and {new_tokens} tokens", new_tokens, "decode"),
    ):
        runs = {f"ours {kind}".strip(): jax_generate(config, tokens, kind) for kind in quantize}
        runs |= {"torch eager": torch_generate(config, tokens, device)} if against else {}
        for run in runs.values():
            run()
        tables.append(
            side_by_side(
                f"Answers, batch {rows}: {title}",
                f"{name}.batch_{rows}",
                interleave(runs, rounds),
                "tokens",
                rows * tokens,
            )
        )
    return tables


def jax_generate(config: ExperimentConfig, new_tokens: int, quantize: str = "") -> Callable[[], np.ndarray]:
    """A call answers one batch, [B, new_tokens]."""
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(x, config.model.dtype), draw_params(abstract_model(config.model), 0)
    )
    generator = Generator(
        config.model,
        params,
        eos_id=NO_TOKEN,
        seg_id=NO_TOKEN,
        max_new_tokens=new_tokens,
        max_masks=0,
        quantize=quantize,
    )
    batch = jax.device_put(example_batch(config))
    return lambda: np.asarray(generator(batch).tokens)


def torch_generate(config: ExperimentConfig, new_tokens: int, device: str = "cpu") -> Callable[[], np.ndarray]:
    """The peer's answers to the same batch."""
    import torch

    from medplib_jax.benchmarks.torch_peer import loaded, to_torch

    dtype = getattr(torch, config.model.dtype)
    peer = loaded(config.model, draw_params(abstract_model(config.model), 0)).eval().to(device, dtype)
    inputs = to_torch(example_batch(config), device, dtype)
    return lambda: peer.generate(inputs, new_tokens).cpu().numpy()
