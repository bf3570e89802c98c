"""Model FLOPs of a training step, and how well it used the machine."""

import jax

from medplib_jax.config.model import ModelConfig

# Dense bf16 FLOP/s of one device, from the makers' data sheets; other kinds report no MFU.
PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def mfu(flops: float, seconds: float) -> float | None:
    """Model FLOPs utilisation of all devices, None for a kind of device without a known peak."""
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    return None if peak is None else flops / seconds / (peak * jax.device_count())


def step_flops(
    config: ModelConfig, batch_size: int, length: int, images: int, masks: int, trainable_share: float
) -> float:
    """Model FLOPs of one training step: what the mathematics needs, without recomputation.

    Per multiply-add 2 forward and 2 for the gradient of the activations (4 in attention, where both factors are activations); 2 more
    for the gradient of the trainable share of the decoder's weights. A top-k mixture counts k experts. CLIP and the mask encoder count
    forward only (they are usually frozen).
    """
    llm, clip, mask = config.llm, config.clip, config.mask
    kv = llm.num_kv_heads * llm.head_dim
    attention = llm.hidden_size * (2 * llm.hidden_size + 2 * kv)
    mlp = 3 * llm.hidden_size * llm.mlp_dim
    experts = len(config.moe_layers) * (config.moe.top_k - 1) * mlp
    weights = llm.num_layers * (attention + mlp) + experts + llm.hidden_size * llm.vocab_size
    causal = llm.num_layers * llm.hidden_size * length  # scores and values are 2 x 2 FLOPs over half of the positions
    decoder = batch_size * length * ((4 + 2 * trainable_share) * weights + 6 * causal)
    clip_layers = clip.num_layers + 1 + clip.select_layer
    towers = images * vit_flops(clip.hidden_size, clip.mlp_dim, clip_layers, clip.num_patches)
    if masks:
        towers += vit_flops(mask.hidden_size, 4 * mask.hidden_size, mask.num_layers, mask.grid**2)
    return decoder + batch_size * towers


def vit_flops(hidden: int, mlp: int, layers: int, positions: int) -> float:
    """Forward FLOPs of a vision transformer over one image."""
    return 2 * layers * positions * (4 * hidden**2 + 2 * hidden * mlp + 2 * hidden * positions)
