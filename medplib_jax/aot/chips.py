"""TPU chips and NVIDIA GPUs as their data sheets have them."""

import dataclasses

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, per second. `ici_rate` adds up what all its links to its neighbours can receive at once."""

    flops: float  # bfloat16
    hbm_bytes: float
    hbm_rate: float
    ici_rate: float


# https://cloud.google.com/tpu/docs/system-architecture-tpu-vm; one way, over the links of all torus dimensions.
TPUS = {
    "v4": Chip(275e12, 32 * 2**30, 1.23e12, 6 * 45e9),
    "v5e": Chip(197e12, 16 * 2**30, 0.82e12, 4 * 45e9),
    "v5p": Chip(459e12, 95 * 2**30, 2.77e12, 6 * 90e9),
    "v6e": Chip(918e12, 32 * 2**30, 1.64e12, 4 * 90e9),
    "tpu7x": Chip(2307e12, 192 * 2**30, 7.4e12, 6 * 90e9),
}

# NVIDIA's data sheets of the A100 80GB SXM, the H100 SXM5 and the H200 SXM: FLOPs without sparsity, half of NVLink's two-way rate.
# HBM bytes are those that CUDA reports of such a GPU.
GPUS = {
    "a100": Chip(312e12, 85_100_068_864, 2.039e12, 300e9),
    "h100": Chip(989e12, 84_942_979_072, 3.352e12, 450e9),
    "h200": Chip(989e12, 151_397_597_184, 4.8e12, 450e9),
}
GPUS_PER_NODE = 8  # at most, joined by NVLink

CHIPS = TPUS | GPUS


def chip_of(topology: str) -> Chip:
    """The chip of a topology such as v5e:8x8 or h200:8. ValueError names the kinds that are known, and how many GPUs a node may have."""
    kind, _, shape = topology.partition(":")
    if kind not in CHIPS or not shape:
        examples = "KIND:SHAPE such as v5e:8x8 or v5p:4x4x4, nor KIND:NUMBER such as h200:8"
        raise ValueError(f"topology {topology!r} is not {examples}; kinds: {', '.join(TPUS)}; GPUs: {', '.join(GPUS)}")
    if kind in GPUS and shape not in map(str, range(1, GPUS_PER_NODE + 1)):
        raise ValueError(
            f"topology {topology!r}: a node has 1 to {GPUS_PER_NODE} GPUs; config.mesh.dcn_data is the number of nodes"
        )
    return CHIPS[kind]
