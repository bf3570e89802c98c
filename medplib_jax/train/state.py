"""What a training step reads and writes."""

from typing import Any

import flax.struct
from jaxtyping import Int

from medplib_jax.batch import Array, Params


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes. Frozen parameters have no optimizer state."""

    step: Int[Array, ""]
    trainable: Params
    frozen: Params
    opt_state: Any
