"""Frozen, validated configuration of the model (`ModelConfig`). Experiments (`configs/`) embed it and add the rest.

Sizes default to MedPLIB-7B. Every dataclass validates itself on construction and says which field is wrong.
"""

import dataclasses
import math
from typing import Literal

from medplib_jax.config.base import NotNegative, Positive, Section, Share, require

MOE_LAYER_SETS = ("dense", "sparse", "first_half", "second_half")
ENCODED_MASK_SIDE = 336  # of the masks that the encoder of examples' masks reads, whatever CLIP reads
LORA_TARGETS = ("q", "k", "v", "qkv", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class ClipConfig(Section, name="clip"):
    """CLIP ViT vision tower (openai/clip-vit-large-patch14-336)."""

    image_size: Positive[int] = 336
    patch_size: Positive[int] = 14
    hidden_size: Positive[int] = 1024
    num_layers: Positive[int] = 24
    num_heads: Positive[int] = 16
    mlp_dim: Positive[int] = 4096
    select_layer: int = -2  # index into hidden_states, as in transformers: -1 is the last layer's output
    layer_norm_eps: Positive[float] = 1e-5

    def __post_init__(self):
        super().__post_init__()
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

    @property
    def computed_layers(self) -> int:
        """How many layers it takes to reach the output of `select_layer`."""
        return self.num_layers + 1 + self.select_layer


@dataclasses.dataclass(frozen=True)
class QwenVisionConfig(Section, name="vit"):
    """Qwen-VL's vision tower (OpenCLIP ViT-bigG) and the resampler behind it. Its output is as wide as the decoder."""

    image_size: Positive[int] = 448
    patch_size: Positive[int] = 14
    hidden_size: Positive[int] = 1664
    num_layers: Positive[int] = 48
    num_heads: Positive[int] = 16
    mlp_dim: Positive[int] = 8192
    position_grid: Positive[int] = 16  # side of the learned position table, interpolated to the patches
    num_queries: Positive[int] = 256
    resampler_head_dim: Positive[int] = 128

    def __post_init__(self):
        super().__post_init__()
        require(
            self.image_size % self.patch_size == 0,
            f"vit.image_size {self.image_size} is not a multiple of vit.patch_size {self.patch_size}",
        )
        require(
            self.hidden_size % self.num_heads == 0,
            f"vit.hidden_size {self.hidden_size} is not divisible by vit.num_heads {self.num_heads}",
        )
        require(
            math.isqrt(self.num_queries) ** 2 == self.num_queries,
            f"vit.num_queries {self.num_queries} is not the square of a whole number",
        )

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def query_grid(self) -> int:
        """Side of the grid on which the queries lie."""
        return math.isqrt(self.num_queries)


@dataclasses.dataclass(frozen=True)
class LlmConfig(Section, name="llm"):
    """LLaMA decoder, or Qwen's: `fused_qkv`, and `trained_length` where longer positions are scaled."""

    vocab_size: Positive[int] = 32267
    hidden_size: Positive[int] = 4096
    num_layers: Positive[int] = 32
    num_heads: Positive[int] = 32
    num_kv_heads: Positive[int] = 32
    mlp_dim: Positive[int] = 11008
    rope_theta: Positive[float] = 10000.0
    rms_norm_eps: Positive[float] = 1e-5
    max_positions: Positive[int] = 4096
    fused_qkv: bool = False  # one projection with a bias yields query, key and value of each head side by side
    trained_length: NotNegative[int] = (
        0  # longer prompts get Qwen's scaling, see `models/language/long_context.py`; 0: none
    )
    ntk: bool = True  # whether it stretches the rotary base
    log_n: bool = True  # whether it sharpens the queries

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.fused_qkv or self.num_kv_heads == self.num_heads,
            f"llm.fused_qkv needs as many llm.num_kv_heads ({self.num_kv_heads}) as llm.num_heads ({self.num_heads})",
        )
        require(self.trained_length >= 0, f"llm.trained_length {self.trained_length} is negative")
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
class MoeConfig(Section, name="moe"):
    """Mixture of experts in place of the decoder's MLPs. `num_experts == 0` means plain MLPs everywhere.

    `layers` is one of dense, sparse (every second from 0), first_half, second_half, or a tuple of layer indices.
    """

    num_experts: NotNegative[int] = 0
    top_k: Positive[int] = 1
    layers: str | tuple[int, ...] = "dense"
    dispatch: Literal["dropless", "capacity"] = "dropless"  # capacity: DeepSpeed's rule, for parity
    capacity_factor: Positive[float] = 1.5
    eval_capacity_factor: Positive[float] = 2.0
    min_capacity: NotNegative[int] = 0
    residual: bool = False  # a dense MLP beside the experts, mixed by a learned coefficient (DeepSpeed use_residual)
    aux_loss_weight: NotNegative[float] = 0.0

    def __post_init__(self):
        if isinstance(self.layers, list):
            object.__setattr__(self, "layers", tuple(self.layers))
        super().__post_init__()
        require(
            self.num_experts == 0 or self.top_k <= self.num_experts,
            f"moe.top_k {self.top_k} is outside [1, moe.num_experts={self.num_experts}]",
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
class MaskConfig(Section, name="mask"):
    """SAM-Med2D: image encoder with adapters, prompt encoder, mask decoder; and how masks return to original size."""

    image_size: Positive[int] = 256
    patch_size: Positive[int] = 16
    hidden_size: Positive[int] = 768
    num_layers: Positive[int] = 12
    num_heads: Positive[int] = 12
    window_size: Positive[int] = 14
    global_layers: tuple[int, ...] = (2, 5, 8, 11)
    adapter: bool = True
    out_dim: Positive[int] = 256
    mask_in_dim: Positive[int] = 16
    decoder_layers: Positive[int] = 2
    decoder_heads: Positive[int] = 8
    decoder_mlp_dim: Positive[int] = 2048
    num_multimask: NotNegative[int] = 3
    iou_head_layers: Positive[int] = 3
    iou_head_dim: Positive[int] = 256
    unpad: Literal["exact", "reference"] = "exact"  # reference: the original's slip in cutting away the padding

    def __post_init__(self):
        super().__post_init__()
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
        require(
            self.out_dim // 2 % self.decoder_heads == 0,
            f"half of mask.out_dim {self.out_dim} is not divisible by mask.decoder_heads {self.decoder_heads}",
        )
        require(self.out_dim % 8 == 0, f"mask.out_dim {self.out_dim} is not a multiple of 8")
        require(self.mask_in_dim % 4 == 0, f"mask.mask_in_dim {self.mask_in_dim} is not a multiple of 4")

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def mask_grid(self) -> int:
        """Side of the decoder's low-resolution masks."""
        return 4 * self.grid


@dataclasses.dataclass(frozen=True)
class RegionConfig(Section, name="region"):
    """How a region of the image becomes one token."""

    sampler: Literal["mean", "geometry"] = "mean"  # geometry: the geometry-aware sampler
    max_points: Positive[int] = 512
    pooling: Literal["max", "mean"] = "max"  # of the geometry-aware sampler


@dataclasses.dataclass(frozen=True)
class IclConfig(Section, name="icl"):
    """How example pictures and their masks come before the picture in question (MedPLIB-ICL).

    `masks`: "overlay" paints an example's mask on its picture. "separate" shows it after the picture, as a picture of
    its own or, with `mask_tokens`, through an encoder of masks.
    """

    masks: Literal["overlay", "separate"] = "overlay"
    compressed_tokens: NotNegative[int] = 0  # positions that a picture takes, 256 in the original; 0: one per patch
    mask_tokens: NotNegative[int] = 0  # positions that an encoded mask takes, 64 in the original; 0: no encoder

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.mask_tokens or self.masks == "separate",
            f"icl.mask_tokens {self.mask_tokens}: an encoder reads masks that are shown 'separate', not {self.masks!r}",
        )

    @property
    def pictures(self) -> int:
        """Pictures that an example takes: a mask is one, too, unless it is painted or encoded."""
        return 2 if self.masks == "separate" and not self.mask_tokens else 1

    @property
    def has_modules(self) -> bool:
        """Whether the model has parameters of its own for examples."""
        return bool(self.compressed_tokens or self.mask_tokens)


@dataclasses.dataclass(frozen=True)
class LoraConfig(Section, name="lora"):
    """Low-rank adapters on the decoder's linear layers. rank 0: none. `targets` are some of LORA_TARGETS."""

    rank: NotNegative[int] = 0
    alpha: NotNegative[float] = 16.0
    dropout: Share = 0.0
    targets: tuple[str, ...] = ("gate", "up", "down")

    def __post_init__(self):
        super().__post_init__()
        unknown = set(self.targets) - set(LORA_TARGETS)
        require(not unknown, f"lora.targets {sorted(unknown)} are not among {' '.join(LORA_TARGETS)}")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.rank else 0.0

    def rank_of(self, target: str) -> int:
        """The adapter's rank on this linear layer, 0 for none."""
        return self.rank if target in self.targets else 0


@dataclasses.dataclass(frozen=True)
class ModelConfig(Section, name="model"):
    """The whole model.

    `dtype` is the type of most products. Router, softmax, norms' statistics, coordinates, logits and losses are float32
    always, and a float32 product is computed as such (on a TPU in six passes). `remat`: see `models/remat.py`.

    `family` says which whole model it is: "medplib" has `clip`, `llm`, `moe`, `region`, `icl` and `mask`, "bird" `vit`
    and `llm`. Code above `models/` asks for what the model can do (`image_tokens`, `draws_masks`, ...).
    """

    family: Literal["medplib", "bird"] = "medplib"
    clip: ClipConfig = ClipConfig()
    vit: QwenVisionConfig = QwenVisionConfig()
    llm: LlmConfig = LlmConfig()
    moe: MoeConfig = MoeConfig()
    mask: MaskConfig = MaskConfig()
    region: RegionConfig = RegionConfig()
    icl: IclConfig = IclConfig()
    lora: LoraConfig = LoraConfig()
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal[
        "none", "full", "outputs", "projections", "gate", "products", "offload", "dots", "dots_no_batch", "auto"
    ] = "none"
    scan_unroll: Positive[int] = 1  # decoder layers unrolled per scan step

    def __post_init__(self):
        super().__post_init__()
        require(self.family == "medplib" or not self.moe.num_experts, "model.family 'bird' has no experts")
        require(self.family == "medplib" or self.icl == IclConfig(), "model.family 'bird' reads no examples")
        heads = ("qkv",) if self.llm.fused_qkv else ("q", "k", "v")
        absent = ({"q", "k", "v", "qkv"} - set(heads)) & set(self.lora.targets)
        require(not absent, f"lora.targets {sorted(absent)}: the decoder has {' '.join(heads)}")
        self.moe.layer_indices(self.llm.num_layers)

    @property
    def image_size(self) -> int:
        """Side of the square pixels that the model sees."""
        return self.clip.image_size if self.family == "medplib" else self.vit.image_size

    @property
    def mask_image_size(self) -> int:
        """Side of the square pixels from which masks are drawn; 0: none are."""
        return self.mask.image_size if self.draws_masks else 0

    @property
    def image_tokens(self) -> int:
        """Positions of the decoder that one picture takes."""
        if self.family == "bird":
            return self.vit.num_queries
        return self.icl.compressed_tokens or self.clip.num_patches

    @property
    def stretches(self) -> bool:
        """Whether pictures are stretched to a square (bicubic), or padded to one (bilinear)."""
        return self.family == "bird"

    @property
    def draws_masks(self) -> bool:
        """Whether answers may hold masks and questions regions; otherwise both are boxes in the text."""
        return self.family == "medplib"

    @property
    def moe_layers(self) -> tuple[int, ...]:
        return self.moe.layer_indices(self.llm.num_layers)
