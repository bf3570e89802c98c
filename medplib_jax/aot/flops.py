"""Model FLOPs of a program (counted by `train.flops`), and the FLOPs that its kernels execute."""

import dataclasses
import math
from collections.abc import Sequence

import jax

from medplib_jax.aot.hlo import Shape
from medplib_jax.aot.programs import make_program
from medplib_jax.config.experiment import ExperimentConfig, MeshConfig
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train.flops import attention_flops, count_flops, splash_flops

CUDNN_BLOCK = 128, 128  # queries and keys of the blocks of scores in cuDNN's flash attention
# Rows that kernels of grouped products take at a time. Not imported: a JAX without Triton cannot have them all.
ROW_TILE = 128
TRITON_DEPTH = MOSAIC_DEPTH = 64  # of bfloat16, in matrices' gradients


def model_flops(
    kind: str, config: ExperimentConfig, chip: jax.Device, rows: int, length: int, labelled: int | None = None
) -> float:
    """FLOPs of one call of the program for the whole batch, whatever the mesh.

    `labelled`: positions of a row with a label, default all.
    """
    model = dataclasses.replace(config.model, remat="none")
    loss = dataclasses.replace(config.loss, ce_chunk=labelled or length)  # all of them in one trip
    config = dataclasses.replace(config, model=model, loss=loss)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), [chip])
    traced = make_program(kind, config, mesh, rows, length).trace()
    return count_flops(traced.jaxpr.jaxpr, loop_trips=config.eval.max_new_tokens if kind == "decode" else 1)


def executed_kernel_flops(name: str, operands: Sequence[Shape]) -> float:
    """FLOPs of one kernel call in a chip's program. Attention by its blocks, a grouped product by its tiles of rows.

    Raises ValueError for a kernel it does not know.
    """
    floating = [shape.dims for shape in operands if shape.dtype in ("bf16", "f16", "f32")]
    if "splash" in name:
        blocks = next(shape.dims[-2:] for shape in operands if shape.dtype == "s8")  # which of them hold a score
        return splash_flops(name, floating, blocks)
    if "fmha" in name:
        return attention_flops(math.prod(floating[0]), floating[0][1], backward="Backward" in name, block=CUDNN_BLOCK)
    if "gmm" in name:
        factors = [shape.dims for shape in operands if len(shape.dims) > 1]
        integers = next(shape.size for shape in operands if shape.dtype == "s32" and len(shape.dims) == 1)
        return _grouped_flops(name, integers, *factors[:2])
    raise ValueError(f"kernel {name} is not one whose FLOPs are known")


def _grouped_flops(name: str, integers: int, first: tuple[int, ...], second: tuple[int, ...]) -> float:
    """Of rows `first` [S, D] with `second`, matrices or other rows.

    Tiles that some sizes of the groups need count, though others leave them out.
    """
    (rows, inner), outer = first, second[-1] if "tgmm" in name else math.prod(second) // (second[0] * first[1])
    if name.startswith("tgmm_triton"):
        rows += integers * TRITON_DEPTH  # every group has steps of its own; as many integers as groups
    elif name.startswith("gmm_triton"):
        rows = (integers - 1) * ROW_TILE  # as many integers as tiles, one of which holds rows of no group
    elif name.startswith("mosaic_tgmm"):
        rows += integers * MOSAIC_DEPTH  # as in Triton's; steps begin at multiples of their depth
    elif name.startswith("mosaic_gmm"):
        rows = (math.ceil(rows / ROW_TILE) + integers - 1) * ROW_TILE  # as many integers as groups
    else:  # a tile across the border of two groups is worked on twice; the groups' borders, and the rest's
        rows += (integers - 3) * ROW_TILE
    return 2.0 * rows * inner * outer
