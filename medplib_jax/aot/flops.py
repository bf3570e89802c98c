"""Model FLOPs: the matrix products that the mathematics of a program needs, counted in the program itself.

Counted is the jaxpr on one chip without rematerialisation and after dead code is gone: gradients of frozen weights are not
there, causal attention counts the half of the scores that it needs, a top-k mixture k experts. Elementwise work is left out.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params
from jax.interpreters import partial_eval as pe

from medplib_jax.aot.hlo import Shape
from medplib_jax.aot.programs import make_program
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig
from medplib_jax.models.kernels.grouped_matmul import TPU_ROW_TILE
from medplib_jax.models.kernels.grouped_matmul_gpu import DEPTH_BYTES, ROWS
from medplib_jax.models.language.attention import splash_block
from medplib_jax.parallel.mesh import make_mesh

CUDNN_BLOCK = 128  # side of the blocks of scores in cuDNN's flash attention


def model_flops(
    kind: str, config: ExperimentConfig, chip: jax.Device, rows: int, length: int, labelled: int | None = None
) -> float:
    """FLOPs of one call of the program for the whole batch, whatever the mesh. `labelled`: positions of a row with a label, default all."""
    model = dataclasses.replace(config.model, remat="none")
    loss = dataclasses.replace(config.loss, ce_chunk=labelled or length)  # all of them in one trip
    config = dataclasses.replace(config, model=model, loss=loss)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), [chip])
    traced = make_program(kind, config, mesh, rows, length).trace()
    return count_flops(traced.jaxpr.jaxpr, loop_trips=config.eval.max_new_tokens if kind == "decode" else 1)


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
        return splash_flops(
            name, [v.aval.shape for v in eqn.invars if jnp.issubdtype(v.aval.dtype, jnp.floating)], needed=True
        )
    return eqn.params["cost_estimate"].flops


def executed_kernel_flops(name: str, operands: Sequence[Shape]) -> float:
    """FLOPs of one kernel call in a chip's program. Attention by its blocks, a grouped product by its tiles of rows.

    Raises ValueError for a kernel it does not know.
    """
    floating = [shape.dims for shape in operands if shape.dtype in ("bf16", "f16", "f32")]
    if "splash" in name:
        return splash_flops(name, floating, needed=False)
    if "fmha" in name:
        return attention_flops(math.prod(floating[0]), floating[0][1], backward="Backward" in name, block=CUDNN_BLOCK)
    if "gmm" in name:
        integers = next(shape.size for shape in operands if shape.dtype == "s32" and len(shape.dims) == 1)
        return _grouped_flops(name, integers, *floating[:2])
    raise ValueError(f"kernel {name} is not one whose FLOPs are known")


def _grouped_flops(name: str, integers: int, first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Of rows `first` [S, D] with `second`, matrices or other rows. Tiles that some sizes of the groups need count, though others leave them out."""
    (rows, inner), outer = first, second[-1] if "tgmm" in name else math.prod(second) // (second[0] * first[1])
    if name.startswith("tgmm_triton"):
        rows += integers * (DEPTH_BYTES // 2)  # every group has steps of its own; as many integers as groups
    elif name.startswith("gmm_triton"):
        rows = (integers - 1) * ROWS  # as many integers as tiles, one of which holds rows of no group
    else:
        rows += (
            (integers - 3) * TPU_ROW_TILE
        )  # a tile across the border of two groups is worked on twice; the groups' borders, and the rest's
    return 2.0 * rows * inner * outer


def splash_flops(name: str, floating_operands: Sequence[tuple[int, ...]], needed: bool) -> float:
    """Of splash attention on q [..., H, L, K], the first operand of as many axes."""
    q = next(shape for shape in floating_operands if len(shape) >= 3)
    return attention_flops(
        math.prod(q), q[-2], backward="fwd" not in name, block=None if needed else splash_block(q[-2])
    )


def attention_flops(size: int, length: int, backward: bool, block: int | None = None) -> float:
    """Of causal attention among `length` positions on queries of `size` values: 2 products forward, 4 backward of half the scores are
    needed. With `block`, what a kernel executes: all blocks of scores of that side that hold one of them, and backward the scores once more.
    """
    if block is None:
        products, share = 4 if backward else 2, 0.5
    else:
        blocks = -(-length // block)
        products, share = 5 if backward else 2, blocks * (blocks + 1) / 2 * (block / length) ** 2
    return products * 2.0 * size * length * share
