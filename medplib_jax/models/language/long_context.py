"""Prompts longer than the model was trained on, as Qwen reads them (modeling_qwen.py): dynamic NTK and log-n scaling.

Neither applies in training. NTK stretches the rotary base by the length of the prompt, in steps of a power of two;
tokens that follow keep what their prompt had. Log-n sharpens the queries at positions beyond the trained length.
"""

import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Array
from medplib_jax.config.model import LlmConfig


def ntk_steps(llm: LlmConfig) -> int:
    """How many stretches of the rotary base there are, the first of which is none."""
    steps = 1
    while llm.trained_length << (steps - 1) < llm.max_positions:
        steps += 1
    return steps


def ntk_index(length_B: Array, llm: LlmConfig) -> Array:
    """Which stretch prompts of this length have, int32 [B]:

    0 up to the trained length L, 1 up to 2 L, 2 up to 4 L, ...
    """
    borders = jnp.array([llm.trained_length << step for step in range(ntk_steps(llm) - 1)], jnp.int32)
    return (length_B[:, None] > borders).sum(-1, dtype=jnp.int32)


def ntk_frequencies(llm: LlmConfig) -> np.ndarray:
    """Rotary frequencies of every stretch, float32 [steps, K/2]: base theta * alpha^(K / (K - 2)), alpha = 1, 3, 7, 15,
    ..., or always 1 without `llm.ntk`.

    Rounded to float32 where the original does: at position 4000 a last digit of a frequency is 2e-4 of an angle.
    """
    K = llm.head_dim
    alpha = 2.0 ** (1 + np.arange(ntk_steps(llm)) * llm.ntk) - 1
    base = llm.rope_theta * alpha ** (K / (K - 2))
    exponent = np.arange(0, K, 2, dtype=np.float32) / np.float32(K)
    return np.float32(1) / (base[:, None] ** exponent.astype(np.float64)).astype(np.float32)


def log_n(index_BxL: Array, trained_length: int) -> Array:
    """The factor on the query at each index, float32 [B, L]:

    Log(i) / log(trained length) for the i-th position, counted from 1, beyond it.
    """
    number = jnp.maximum(index_BxL + 1, trained_length).astype(jnp.float32)
    return jnp.log(number) / np.log(np.float32(trained_length))
