"""Prefill and a fixed number of greedy tokens, beside the same in PyTorch."""

from collections.abc import Callable

import jax
import numpy as np

from medplib_jax.benchmarks.measure import Table, interleave, side_by_side
from medplib_jax.benchmarks.workload import Rival, example_batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.layers import draw_params
from medplib_jax.train.step import abstract_model

NO_TOKEN = -1  # as end and <SEG>: every answer has full length, and no masks are drawn


def compare(config: ExperimentConfig, rival: Rival | None, rounds: int, new_tokens: int) -> list[Table]:
    """Time to the first token, and tokens per second of prefill and `new_tokens` tokens together.

    A table for each, at the config's batch size.
    """
    rows = config.data.batch_size
    tables = []
    for title, tokens, name in (
        ("first token", 1, "first_token"),
        (f"prefill and {new_tokens} tokens", new_tokens, "decode"),
    ):
        runs = {f"ours {kind}".strip(): jax_generate(config, tokens, kind) for kind in ("", "int8")}
        runs |= {"torch eager": torch_generate(config, tokens, rival)} if rival else {}
        for run in runs.values():
            run()
        title, name, samples = f"Answers, batch {rows}: {title}", f"{name}.batch_{rows}", interleave(runs, rounds)
        tables.append(side_by_side(title, name, samples, "tokens", rows * tokens))
    return tables


def jax_generate(config: ExperimentConfig, new_tokens: int, quantize: str = "") -> Callable[[], np.ndarray]:
    """A call answers one batch, [B, new_tokens]."""
    params = jax.tree.map(
        lambda x: jax.numpy.asarray(x, config.model.dtype), draw_params(abstract_model(config.model), 0)
    )
    generator = Generator(
        config.model,
        params,
        DecodeOptions(max_new_tokens=new_tokens, max_masks=0, quantize=quantize),
        stop_ids=(NO_TOKEN,),
        seg_id=NO_TOKEN,
    )
    batch = jax.device_put(example_batch(config))
    return lambda: np.asarray(generator(batch).tokens)


def torch_generate(config: ExperimentConfig, new_tokens: int, rival: Rival) -> Callable[[], np.ndarray]:
    """The peer's answers to the same batch."""
    peer, inputs = rival.model(config.model).eval(), rival.inputs(config)
    return lambda: peer.generate(inputs, new_tokens).cpu().numpy()
