"""Frozen, validated configuration of the model (`ModelConfig`). Experiments (`configs/`) embed it and add the rest.

Sizes default to MedPLIB-7B. Every dataclass validates itself on construction and says which field is wrong.
"""

import dataclasses

from medplib_jax.config.base import require

MOE_LAYER_SETS = ("dense", "sparse", "first_half", "second_half")


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """CLIP ViT vision tower (openai/clip-vit-large-patch14-336)."""

    image_size: int = 336
    patch_size: int = 14
    hidden_size: int = 1024
    num_layers: int = 24
    num_heads: int = 16
    mlp_dim: int = 4096
    select_layer: int = -2  # index into hidden_states, as in transformers: -1 is the last layer's output
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        require(
            self.image_size % self.patch_size == 0,
            f"clip.image_size {self.image_size} is not a multiple of clip.patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"clip.hidden_size {self.hidden_size} is not divisible by clip.num_heads {self.num_heads}",
        )
        require(
            -self.num_layers - 1 <= self.select_layer <= -1,
            f"clip.select_layer {self.select_layer} is outside [-{self.num_layers + 1}, -1]",
        )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid**2


@dataclasses.dataclass(frozen=True)
class LlmConfig:
    """LLaMA decoder."""

    vocab_size: int = 32267
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    mlp_dim: int = 11008
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_positions: int = 4096

    def __post_init__(self):
        require(
            self.hidden_size % self.num_heads == 0,
            f"llm.hidden_size {self.hidden_size} is not divisible by llm.num_heads {self.num_heads}",
        )
        require(
            self.num_heads % self.num_kv_heads == 0,
            f"llm.num_heads {self.num_heads} is not divisible by llm.num_kv_heads {self.num_kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"llm head width {self.head_dim} must be even for rotary embeddings")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


@dataclasses.dataclass(frozen=True)
class MoeConfig:
    """Mixture of experts in place of the decoder's MLPs. `num_experts == 0` means plain MLPs everywhere.

    `layers` is one of dense, sparse (every second from 0), first_half, second_half, or a tuple of layer indices.
    """

    num_experts: int = 0
    top_k: int = 1
    layers: str | tuple[int, ...] = "dense"
    dispatch: str = "dropless"  # or "capacity": DeepSpeed's rule, for parity
    capacity_factor: float = 1.5
    eval_capacity_factor: float = 2.0
    min_capacity: int = 0
    residual: bool = False  # a dense MLP beside the experts, mixed by a learned coefficient (DeepSpeed use_residual)
    aux_loss_weight: float = 0.0

    def __post_init__(self):
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        require(self.num_experts >= 0, f"moe.num_experts {self.num_experts} is negative")
        require(
            self.num_experts == 0 or 1 <= self.top_k <= self.num_experts,
            f"moe.top_k {self.top_k} is outside [1, moe.num_experts={self.num_experts}]",
        )
        require(
            self.dispatch in ("dropless", "capacity"),
            f"moe.dispatch {self.dispatch!r} is neither 'dropless' nor 'capacity'",
        )
        require(self.dispatch == "dropless" or self.top_k <= 2, "moe.dispatch 'capacity' knows top_k 1 and 2 only")
        require(
            not isinstance(self.layers, str) or self.layers in MOE_LAYER_SETS,
            f"moe.layers {self.layers!r} is not one of {MOE_LAYER_SETS} or a list of indices",
        )

    def layer_indices(self, num_layers: int) -> tuple[int, ...]:
        """Which of the decoder's layers hold experts, ascending."""
        if self.num_experts == 0:
            return ()
        everything = range(num_layers)
        named = {
            "dense": everything,
            "sparse": everything[::2],
            "first_half": everything[: num_layers // 2],
            "second_half": everything[num_layers // 2 :],
        }
        indices = tuple(named[self.layers]) if isinstance(self.layers, str) else tuple(sorted(set(self.layers)))
        require(
            all(0 <= i < num_layers for i in indices),
            f"moe.layers {self.layers} names a layer outside [0, {num_layers})",
        )
        return indices


@dataclasses.dataclass(frozen=True)
class MaskConfig:
    """SAM-Med2D: image encoder with adapters, prompt encoder, mask decoder; and how masks return to original size."""

    image_size: int = 256
    patch_size: int = 16
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    window_size: int = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    adapter: bool = True
    out_dim: int = 256
    mask_in_dim: int = 16
    decoder_layers: int = 2
    decoder_heads: int = 8
    decoder_mlp_dim: int = 2048
    num_multimask: int = 3
    iou_head_layers: int = 3
    iou_head_dim: int = 256
    unpad: str = "exact"  # or "reference": the original's slip in cutting away the padding

    def __post_init__(self):
        object.__setattr__(self, "global_layers", tuple(self.global_layers))
        require(
            self.image_size % self.patch_size == 0,
            f"mask.image_size {self.image_size} is not a multiple of mask.patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"mask.hidden_size {self.hidden_size} is not divisible by mask.num_heads {self.num_heads}",
        )
        require(
            all(0 <= i < self.num_layers for i in self.global_layers),
            f"mask.global_layers {self.global_layers} names a layer outside [0, {self.num_layers})",
        )
        require(self.unpad in ("exact", "reference"), f"mask.unpad {self.unpad!r} is neither 'exact' nor 'reference'")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def mask_grid(self) -> int:
        """Side of the decoder's low-resolution masks."""
        return 4 * self.grid


@dataclasses.dataclass(frozen=True)
class RegionConfig:
    """How a region of the image becomes one token."""

    sampler: str = "mean"  # or "geometry": the geometry-aware sampler
    max_points: int = 512
    pooling: str = "max"  # of the geometry-aware sampler: max or mean

    def __post_init__(self):
        require(
            self.sampler in ("mean", "geometry"), f"region.sampler {self.sampler!r} is neither 'mean' nor 'geometry'"
        )
        require(self.pooling in ("max", "mean"), f"region.pooling {self.pooling!r} is neither 'max' nor 'mean'")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters on the decoder's linear layers. rank 0: none. Targets: q k v o gate up down."""

    rank: int = 0
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("gate", "up", "down")

    def __post_init__(self):
        object.__setattr__(self, "targets", tuple(self.targets))
        unknown = set(self.targets) - {"q", "k", "v", "o", "gate", "up", "down"}
        require(not unknown, f"lora.targets {sorted(unknown)} are not among q k v o gate up down")
        require(0.0 <= self.dropout < 1.0, f"lora.dropout {self.dropout} is outside [0, 1)")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def rank_of(self, target: str) -> int:
        """The adapter's rank on this linear layer, 0 for none."""
        return self.rank if target in self.targets else 0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The whole model. `dtype` is the compute type; router, softmax, norms' statistics, logits and losses are float32 always."""

    clip: ClipConfig = ClipConfig()
    llm: LlmConfig = LlmConfig()
    moe: MoeConfig = MoeConfig()
    mask: MaskConfig = MaskConfig()
    region: RegionConfig = RegionConfig()
    lora: LoraConfig = LoraConfig()
    dtype: str = "float32"
    remat: str = "none"  # policy name in models/remat: none, full, dots, ...
    scan_unroll: int = 1  # decoder layers unrolled per scan step

    def __post_init__(self):
        require(
            self.dtype in ("float32", "bfloat16"), f"model.dtype {self.dtype!r} is neither 'float32' nor 'bfloat16'"
        )
        require(self.scan_unroll >= 1, f"model.scan_unroll {self.scan_unroll} must be at least 1")
        self.moe.layer_indices(self.llm.num_layers)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.moe.layer_indices(self.llm.num_layers)
