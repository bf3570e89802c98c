"""Model FLOPs, counted in a program itself; the one table of chips; and how well a training step used them.

Counted are the matrix products that the mathematics of a program needs: those of its jaxpr without rematerialisation
and after dead code is gone. Gradients of frozen weights are not there, causal attention counts the half of the scores
that it needs, a top-k mixture counts k experts. Elementwise work is left out.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe
from jax.tree_util import Partial

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.models.layers import params_of
from medplib_jax.train.step import Knobs, abstract_model, make_state, make_train_step


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates, per second, of what JAX calls a device. `ici_rate` is what all links to its neighbours can receive
    at once.

    `kinds`: its `device_kind` in JAX. `int8_ops`: as `flops`, of products of 8-bit integers; a chip for which no such
    rate is published gets that of bfloat16.
    """

    kinds: tuple[str, ...]
    flops: float  # bfloat16
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float
    int8_ops: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; one way, over the links of all torus dimensions. A
# TPU7x chip is two devices, each with half of the chip's FLOPs, memory and links. A v4 chip has two cores that are
# one device ("megacore").
TPUS = {
    "v4": Chip(("TPU v4",), 275e12, 32 * 2**30, 1.23e12, 6 * 45e9, 275e12),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 16 * 2**30, 0.82e12, 4 * 45e9, 394e12),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95 * 2**30, 2.77e12, 6 * 90e9, 918e12),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 32 * 2**30, 1.64e12, 4 * 90e9, 1836e12),
    "tpu7x": Chip(("TPU7x", "TPU 7x"), 2307e12 / 2, 192 * 2**30 / 2, 7.4e12 / 2, 6 * 90e9 / 2, 2307e12 / 2),
}

# NVIDIA's data sheets of the A100 80GB SXM, the H100 SXM5 and the H200 SXM: FLOPs without sparsity, half of NVLink's
# two-way rate. HBM bytes are those that CUDA reports of such a GPU.
GPUS = {
    "a100": Chip(("NVIDIA A100-SXM4-80GB",), 312e12, 85_100_068_864, 2.039e12, 300e9, 624e12),
    "h100": Chip(("NVIDIA H100 80GB HBM3",), 989e12, 84_942_979_072, 3.352e12, 450e9, 1979e12),
    "h200": Chip(("NVIDIA H200",), 989e12, 151_397_597_184, 4.8e12, 450e9, 1979e12),
}
GPUS_PER_NODE = 8  # at most, joined by NVLink

CHIPS = TPUS | GPUS


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:8x8 or h200:8.

    ValueError names the kinds that are known, and how many GPUs a node may have.
    """
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        examples = "KIND:SHAPE such as v5e:8x8 or v5p:4x4x4, nor KIND:NUMBER such as h200:8"
        raise ValueError(f"topology {topology!r} is not {examples}; kinds: {', '.join(TPUS)}; GPUs: {', '.join(GPUS)}")
    if kind in GPUS and shape not in map(str, range(1, GPUS_PER_NODE + 1)):
        raise ValueError(
            f"topology {topology!r}: a node has 1 to {GPUS_PER_NODE} GPUs; config.mesh.dcn_data is the number of nodes"
        )
    return CHIPS[kind]


def chip_of_device(device: jax.Device) -> Chip | None:
    """What the table says of a device; None for one that is not in it, such as a CPU."""
    return next((chip for chip in CHIPS.values() if device.device_kind in chip.kinds), None)


def mfu(flops: float, seconds: float) -> float | None:
    """Model FLOPs utilisation of all devices, None for a kind of device without a known peak."""
    chip = chip_of_device(jax.devices()[0])
    return None if chip is None else flops / seconds / (chip.flops * jax.device_count())


def step_flops(config: ExperimentConfig, batch: Batch) -> float:
    """Model FLOPs of one training step on a batch of these shapes, over all devices; every position counts as one
    with a label.

    It traces the step (about a second at 7B) and computes nothing.
    """
    model = dataclasses.replace(config.model, remat="none")
    loss = dataclasses.replace(config.loss, ce_chunk=batch.tokens.shape[1])  # all positions in one trip of the loop
    config = dataclasses.replace(config, model=model, loss=loss)
    module, tx = abstract_model(model), optax.identity()
    state = jax.eval_shape(lambda params: make_state(params, config, tx), params_of(module))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    knobs = Knobs(Partial(lambda step: 0.0), 0)
    return count_flops(jax.make_jaxpr(make_train_step(module, config, tx))(state, shapes, knobs).jaxpr)


def count_flops(jaxpr, loop_trips: int = 1) -> float:
    """FLOPs of the products in a jaxpr; a loop without a known number of trips counts as `loop_trips`."""
    live, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars), instantiate=True)
    return sum(_equation_flops(eqn, loop_trips) for eqn in live.eqns)


def _equation_flops(eqn, loop_trips: int) -> float:
    name, params = eqn.primitive.name, eqn.params
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        return 2.0 * eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[axis] for axis in contracting)
    if name == "conv_general_dilated":
        kernel, out_axis = eqn.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        return 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[out_axis]
    if name == "pallas_call":
        return _kernel_flops(eqn)
    if name == "ragged_dot_general" or str(params.get("name")).startswith("mosaic_"):  # of rows [S, D], F columns
        return 2.0 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[-1]
    if name.startswith("dot_product_attention"):
        q = eqn.invars[0].aval
        return attention_flops(q.size, q.shape[1], backward="bwd" in name)
    if name == "cond":
        return max(count_flops(branch.jaxpr, loop_trips) for branch in params["branches"])
    times = {"scan": params.get("length"), "while": loop_trips}.get(name, 1)
    return times * sum(count_flops(inner, loop_trips) for inner in jaxprs_in_params(params))


def _kernel_flops(eqn) -> float:
    name = eqn.params["name"] or ""
    if name.startswith("splash"):
        operands = [v.aval.shape for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)]
        return splash_flops(name, operands)
    return eqn.params["cost_estimate"].flops


def splash_flops(
    name: str, floating_operands: Sequence[tuple[int, ...]], blocks: tuple[int, int] | None = None
) -> float:
    """Of splash attention on q [..., H, L, K], the first operand of as many axes. `blocks`: into how many the kernel
    cuts queries and keys, for what it executes."""
    q = next(shape for shape in floating_operands if len(shape) >= 3)
    sides = blocks and tuple(q[-2] // number for number in blocks)
    return attention_flops(math.prod(q), q[-2], backward="fwd" not in name, block=sides)


def attention_flops(size: int, length: int, backward: bool, block: tuple[int, int] | None = None) -> float:
    """Of causal attention among `length` positions on queries of `size` values.

    Needed are 2 products forward and 4 backward of half the scores. With `block`, what a kernel executes: all blocks
    of so many queries and keys that hold one of them, and backward the scores once more.
    """
    if block is None:
        products, share = 4 if backward else 2, 0.5
    else:
        queries, keys = block
        ends = (min(start + queries, length) for start in range(0, length, queries))
        executed = sum(-(-end // keys) for end in ends)
        products, share = 5 if backward else 2, executed * (queries / length) * (keys / length)
    return products * 2.0 * size * length * share
