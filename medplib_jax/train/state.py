"""What a training step reads and writes."""

from typing import Any

import flax.struct
import jax
from jaxtyping import Int

from medplib_jax.batch import Array, Params, flatten


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes. Frozen parameters have no optimizer state."""

    step: Int[Array, ""]
    trainable: Params
    frozen: Params
    opt_state: Any


def overview(state: TrainState) -> str:
    """A table of the parameters: name, shape, dtype, whether it trains, over which mesh axes it is sharded, bytes."""
    rows = [("parameter", "shape", "dtype", "trains", "sharding", "bytes")]
    for trains, tree in (("yes", state.trainable), ("no", state.frozen)):
        for path, x in flatten(tree).items():
            spec = ", ".join(str(axes) for axes in x.sharding.spec)
            rows.append((path, " x ".join(map(str, x.shape)), x.dtype.name, trains, f"({spec})", f"{x.nbytes:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    counts = [sum(x.size for x in jax.tree.leaves(tree)) / 1e6 for tree in (state.trainable, state.frozen)]
    return "\n".join([*lines, f"{counts[0]:.2f} of {sum(counts):.2f} million parameters train"])
