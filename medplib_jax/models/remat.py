"""Named rematerialisation policies: what the backward pass recomputes inside each decoder layer."""

from collections.abc import Callable

import jax

_policies = jax.checkpoint_policies
# Kernels and loops hide their products, so policies that save products name their results.
_OUTPUTS = ("query", "attention", "attended", "experts")  # see `models/attention.py`, `llm.py` and `moe.py`
_PROJECTIONS = (*_OUTPUTS, "key", "value")
_named = _policies.save_only_these_names("grouped_matmul", *_PROJECTIONS)

POLICIES = {
    "full": _policies.nothing_saveable,
    "outputs": _policies.save_only_these_names(*_OUTPUTS),
    "projections": _policies.save_only_these_names(*_PROJECTIONS),
    "products": _policies.save_only_these_names("gate", "up", *_PROJECTIONS),
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _named),
    "dots_no_batch": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _named),
}


def remat(name: str) -> Callable[[Callable], Callable]:
    """A wrapper for the step of a scan: `none` keeps every intermediate, `full` only the step's inputs, `outputs` also
    queries and the results of attention and of the experts (no wider than the model: cheap to keep for what they cost), `projections` keys and
    values too, `products` also what an MLP is wide in, so that no wide product runs twice, `dots` the results of matrix products, `dots_no_batch` those of weights (attention scores are recomputed). Raises ValueError on another name."""
    if name == "none":
        return lambda step: step
    if name not in POLICIES:
        raise ValueError(f"model.remat {name!r} is not one of {['none', *POLICIES]}")
    return lambda step: jax.checkpoint(step, policy=POLICIES[name], prevent_cse=False)
