"""Named rematerialisation policies: what a decoder layer keeps of its forward pass, the rest being computed again.

| `model.remat`   | kept, beside each layer's input                    | computed again                            |
| --------------- | -------------------------------------------------- | ----------------------------------------- |
| `none`          | everything                                         | nothing                                   |
| `full`          | nothing                                            | the whole layer                           |
| `outputs`       | queries, results of attention, experts, adapters'  | keys, values, the wide products of an MLP |
| `projections`   | that, keys and values                              | the wide products of an MLP               |
| `gate`          | that, and one of the two wide products of an MLP   | the other one                             |
| `products`      | that, and both of them                             | norms, rotations, activations             |
| `offload`       | the same, the wide ones in the host's memory       | norms, rotations, activations             |
| `dots`          | the results of all matrix products, scores too     | everything elementwise                    |
| `dots_no_batch` | the results of products with weights               | attention scores, everything elementwise  |

What `outputs` keeps is as narrow as the model and costs much to compute: it is the cheapest step up from `full`.
`auto` is none of them: `train/remat.py` puts one in its place, by the memory of the machine.
"""

from collections.abc import Callable

import jax

_policies = jax.checkpoint_policies
# Kernels and loops hide their products from these policies, so layers name the results (`checkpoint_name`).
_OUTPUTS = ("query", "attention", "attended", "experts", "low")
_PROJECTIONS = (*_OUTPUTS, "key", "value")
_WIDE = ("gate", "up")
_named = _policies.save_only_these_names("grouped_matmul", *_PROJECTIONS)

POLICIES = {
    "full": _policies.nothing_saveable,
    "outputs": _policies.save_only_these_names(*_OUTPUTS),
    "projections": _policies.save_only_these_names(*_PROJECTIONS),
    "gate": _policies.save_only_these_names("gate", *_PROJECTIONS),
    "products": _policies.save_only_these_names(*_WIDE, *_PROJECTIONS),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=_PROJECTIONS,
        names_which_can_be_offloaded=_WIDE,
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "dots": _policies.save_from_both_policies(_policies.dots_saveable, _named),
    "dots_no_batch": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _named),
}


def remat(name: str) -> Callable[[Callable], Callable]:
    """A wrapper for the body of a scan over layers, by the name of a policy."""
    if name == "auto":
        raise ValueError("model.remat 'auto' is for training, which puts a policy in its place (train/remat.py)")
    if name == "none":
        return lambda step: step
    return lambda step: jax.checkpoint(step, policy=POLICIES[name], prevent_cse=False)
