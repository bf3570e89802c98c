"""Prefill and a fixed number of greedy tokens, beside the same in PyTorch."""

from collections.abc import Callable

import jax
import numpy as np

from medplib_jax.benchmarks.workload import example_batch
from medplib_jax.decode import Generator
from medplib_jax.experiment import ExperimentConfig
from medplib_jax.models.layers import draw_params
from medplib_jax.train_step import abstract_model

NO_TOKEN = -1  # as end and <SEG>: every answer has full length, and no masks are drawn


def jax_generate(config: ExperimentConfig, new_tokens: int) -> Callable[[], np.ndarray]:
    """A call answers one batch, [B, new_tokens]."""
    params = jax.tree.map(lambda x: jax.numpy.asarray(x, config.model.dtype), draw_params(abstract_model(config.model), 0))
    generator = Generator(config.model, params, eos_id=NO_TOKEN, seg_id=NO_TOKEN, max_new_tokens=new_tokens, max_masks=0)
    batch = jax.device_put(example_batch(config))
    return lambda: np.asarray(generator(batch).tokens)


def torch_generate(config: ExperimentConfig, new_tokens: int, device: str = "cpu") -> Callable[[], np.ndarray]:
    """The peer's answers to the same batch."""
    import torch

    from medplib_jax.benchmarks.torch_peer import Peer, to_torch

    dtype = getattr(torch, config.model.dtype)
    peer = Peer(config.model).load(draw_params(abstract_model(config.model), 0)).eval().to(device, dtype)
    inputs = to_torch(example_batch(config), device, dtype)
    return lambda: peer.generate(inputs, new_tokens).cpu().numpy()
