"""FLOPs of the matrix products and convolutions in a compiled program, those that call NVIDIA's libraries too."""

import math
import re

import numpy as np

from medplib_jax.aot.hlo import Computation, Instruction, Shape


def product_flops(instruction: Instruction, computation: Computation) -> float:
    """FLOPs of one execution: 2 per multiplication that is added up; 0 for what is no product."""
    target = instruction.target
    if instruction.opcode == "dot" or _is_matmul(target):
        lhs = computation[instruction.operands[0]].shapes[0].dims
        return 2.0 * instruction.shapes[0].size * math.prod(lhs[axis] for axis in _contracted(instruction.attributes))
    if instruction.opcode == "convolution" or _is_convolution(target):
        return _convolution_flops(
            instruction, *(computation[operand].shapes[0] for operand in instruction.operands[:2])
        )
    return 0.0


def multiplies_integers(instruction: Instruction, computation: Computation) -> bool:
    """Whether the factors of a product are integers of 8 bits."""
    return all(computation[name].shapes[0].dtype == "s8" for name in instruction.operands[:2])


def _is_matmul(target: str) -> bool:
    """Whether a custom call's target is a product of cuBLAS."""
    return target.startswith("__cublas$") and any(name in target for name in ("matmul", "gemm"))


def _is_convolution(target: str) -> bool:
    return target.startswith("__cudnn$conv")


def _contracted(attributes: str) -> list[int]:
    """Axes of the left factor that a product sums over.

    From lhs_contracting_dims={1} of a dot, or "lhs_contracting_dimensions":["1"] of cuBLAS.
    """
    found = re.search(r'lhs_contracting_dim(?:s=\{|ensions":\s*\[)([\d,"\s]*)', attributes)
    return [int(axis) for axis in re.findall(r"\d+", found.group(1))]


def _convolution_flops(instruction: Instruction, first: Shape, second: Shape) -> float:
    """FLOPs of a convolution, as XLA's HloCostAnalysis counts them.

    2 * batch * features in * features out * pairs of an output and a kernel position that meet an input.

    The TPU compiler writes every matrix product as a convolution; batch axes become spatial ones with holes. cuDNN's
    gradients name the axes of the forward convolution, whose input or kernel is their result.
    """
    result = instruction.shapes[0]
    operands = {
        "__cudnn$convBackwardInput": (result, second, first),
        "__cudnn$convBackwardFilter": (first, result, second),
    }
    lhs_dims, rhs_dims, out_dims = (shape.dims for shape in operands.get(instruction.target, (first, second, result)))
    lhs, rhs, out = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
    window = _window(instruction.attributes)
    pairs = 1
    for axis, label in enumerate(sorted(set(lhs) - set("bf"))):
        parameters = {name: values[axis] for name, values in window.items()}
        pairs *= _meeting_pairs(
            lhs_dims[lhs.index(label)], rhs_dims[rhs.index(label)], out_dims[out.index(label)], parameters
        )
    batch_groups = int((re.search(r"batch_group_count=(\d+)", instruction.attributes) or [0, 1])[1])
    rows = lhs_dims[lhs.index("b")] // batch_groups
    return 2.0 * rows * rhs_dims[rhs.index("i")] * rhs_dims[rhs.index("o")] * pairs


def _window(attributes: str) -> dict[str, list]:
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(field.split("=") for field in found.group(1).split()) if found else {}
    return {name: values.split("x") for name, values in fields.items()}


def _meeting_pairs(inputs: int, kernel: int, outputs: int, window: dict[str, str]) -> int:
    stride, holes, spread = (int(window.get(name, 1)) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    pad = int(window.get("pad", "0_0").split("_")[0])
    position = np.arange(outputs)[:, None] * stride - pad + np.arange(kernel)[None, :] * spread
    return int(((position >= 0) & (position % holes == 0) & (position // holes < inputs)).sum())
