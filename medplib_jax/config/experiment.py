"""One experiment: the model and everything around it, as frozen dataclasses. `configs/*.py` build one; flags change it."""

import dataclasses
import re
from typing import ClassVar

from medplib_jax.config.base import require
from medplib_jax.config.model import ModelConfig


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What is read and how it becomes batches of static shape.

    `sources` are annotation files in MeCoVQA's form or datasets assembled from them (FOLDER#SPLIT), `weights` their shares of the
    mixture (empty: by size).
    """

    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    root: str = ""  # folder where the paths inside the sources start; empty: the folder of each source
    tokenizer: str = ""
    template: str = "llava_v1"  # training template of the original; evaluation uses "v1"
    bucket_lengths: tuple[int, ...] = (1024,)  # final lengths, image tokens included
    batch_size: int = 128  # global
    pack: bool = False  # several conversations in a row, as far as they have no masks and fit the longest bucket and the slots below
    max_images: int = 1
    max_regions: int = 1
    max_masks: int = 1  # 0: no mask slots, the mask head is not run
    mask_canvas: int = 1024  # masks longer than this are shrunk to fit
    cache: str = (
        ""  # folder where resized pictures, masks and regions are kept for later epochs and runs; empty: memory only
    )
    region_augmentation: str = (
        "none"  # or "exact": a random part of each region in training; "reference": with the original's slip
    )
    on_error: str = "raise"  # or "skip": count and name the record, take another one
    workers: int = 2

    def __post_init__(self):
        for name in ("sources", "weights", "bucket_lengths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        require(
            not self.weights or len(self.weights) == len(self.sources),
            f"data.weights has {len(self.weights)} entries for {len(self.sources)} data.sources",
        )
        require(
            self.bucket_lengths == tuple(sorted(set(self.bucket_lengths))) and len(self.bucket_lengths) > 0,
            f"data.bucket_lengths {self.bucket_lengths} must ascend",
        )
        require(self.on_error in ("raise", "skip"), f"data.on_error {self.on_error!r} is neither 'raise' nor 'skip'")
        modes = ("none", "exact", "reference")
        require(
            self.region_augmentation in modes,
            f"data.region_augmentation {self.region_augmentation!r} is not one of {modes}",
        )
        require(self.template in ("llava_v1", "v1"), f"data.template {self.template!r} is neither 'llava_v1' nor 'v1'")


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with clipping by global norm. `trainable` are regular expressions searched in parameter paths."""

    lr: float = 3e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    warmup: float = 0.01  # share of ONE epoch's steps, at least 2 steps
    schedule: str = "exact"  # or "reference": the original's first step runs at full rate
    trainable: tuple[str, ...] = (".*",)
    lr_scale: tuple[tuple[str, float], ...] = ()  # (path pattern, factor); the first match counts
    accumulate: int = 1
    frozen_dtype: str = "float32"

    def __post_init__(self):
        object.__setattr__(self, "trainable", tuple(self.trainable))
        object.__setattr__(self, "lr_scale", tuple((pattern, float(factor)) for pattern, factor in self.lr_scale))
        require(
            self.schedule in ("exact", "reference"),
            f"optim.schedule {self.schedule!r} is neither 'exact' nor 'reference'",
        )
        require(
            self.frozen_dtype in ("float32", "bfloat16"),
            f"optim.frozen_dtype {self.frozen_dtype!r} is neither 'float32' nor 'bfloat16'",
        )
        for pattern in (*self.trainable, *(pattern for pattern, _ in self.lr_scale)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"optim pattern {pattern!r} is not a regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the loss terms (spec: the stages' table)."""

    ce: float = 1.0
    dice: float = 0.0
    bce: float = 0.0
    focal: float = 0.0
    iou: float = 0.0
    ce_chunk: int = 64  # positions of each row whose logits exist at a time, so that [B, L, V] never does


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes inside a slice, one of which may be -1 (whatever is left), and the number of TPU slices.

    Rows of a batch are spread over data, fsdp and expert; parameters as `ShardingConfig` says. The data axis goes on over the slices.
    """

    AXES: ClassVar = ("data", "fsdp", "expert", "tensor")

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    dcn_data: int = 1

    def __post_init__(self):
        require(
            all(size == -1 or size >= 1 for size in self.sizes) and self.sizes.count(-1) <= 1,
            f"mesh sizes {self.sizes} of {', '.join(self.AXES)} must be positive, at most one -1",
        )
        require(self.dcn_data >= 1, f"mesh.dcn_data {self.dcn_data} must be at least 1")

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.data, self.fsdp, self.expert, self.tensor


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """Over which mesh axis each logical axis of a parameter is spread: a name, several joined by commas, or nothing (kept whole)."""

    embed: str = "fsdp"
    heads: str = "tensor"
    kv_heads: str = "tensor"
    mlp: str = "tensor"
    expert: str = "expert"
    vocab: str = ""  # 32,267 = 41 x 787 divides by no mesh; the embedding is spread along its width instead
    vision: str = ""  # CLIP and SAM: 0.4 B frozen parameters
    layers: str = ""
    lora_embed: str = ""  # the model's width in an adapter
    lora_rank: str = ""
    norm: str = ""

    def __post_init__(self):
        for name in self.names():
            axes = self.mesh_axes(name)
            unknown = [axis for axis in axes if axis not in MeshConfig.AXES]
            require(
                not unknown,
                f"sharding.{name} names {', '.join(unknown)}, but the mesh axes are {', '.join(MeshConfig.AXES)}",
            )
            require(len(set(axes)) == len(axes), f"sharding.{name} {','.join(axes)!r} names a mesh axis twice")
        require(not self.layers, "sharding.layers must stay empty: a scan over layers needs all of them on every chip")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """The logical axes that have a rule."""
        return tuple(field.name for field in dataclasses.fields(cls))

    def mesh_axes(self, name: str) -> tuple[str, ...]:
        """The mesh axes of one logical axis."""
        return tuple(axis.strip() for axis in getattr(self, name).split(",") if axis.strip())


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Where parameters come from. Each is a checkpoint directory (workdir of an earlier stage); empty: random."""

    stage: int = 0  # 1 align, 2 visual-language expert, 3 grounding expert, 4 MoE; 0: a single fine-tuning
    base: str = ""
    grounding: str = ""  # stage IV: expert 0, SEG MLP and mask head come from here

    def __post_init__(self):
        require(0 <= self.stage <= 4, f"init.stage {self.stage} is outside [0, 4]")
        require(self.stage == 4 or not self.grounding, "init.grounding is read by stage 4 only")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length of the run and what is written when. `steps` wins over `epochs` when positive.

    Checkpoints that stay: the newest `keep`, and the `keep_best` of the smallest mean loss since the checkpoint before. A run
    in which no step begins for `hang_seconds` (compiling counts) ends, to be started again.
    """

    steps: int = 0
    epochs: float = 1.0
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 500
    keep: int = 2
    keep_best: int = 0
    hang_seconds: float = 3600.0

    def __post_init__(self):
        require(self.keep >= 1, f"train.keep {self.keep} is below 1: a run could not be resumed")
        require(self.keep_best >= 0, f"train.keep_best {self.keep_best} is negative")
        require(self.hang_seconds > 0, f"train.hang_seconds {self.hang_seconds} is not positive")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation."""

    sources: tuple[str, ...] = ()
    batch_size: int = 16  # answers in the making per device
    max_new_tokens: int = 64
    mask_threshold: float = 0.5  # on the sigmoid; the original evaluates at 0.1

    def __post_init__(self):
        object.__setattr__(self, "sources", tuple(self.sources))
        require(0.0 < self.mask_threshold < 1.0, f"eval.mask_threshold {self.mask_threshold} is outside (0, 1)")


@dataclasses.dataclass(frozen=True)
class ExperimentConfig:
    """Everything a run reads; saved as JSON beside its checkpoints."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    loss: LossConfig = LossConfig()
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()
    init: InitConfig = InitConfig()
    train: TrainConfig = TrainConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        longest, limit = self.data.bucket_lengths[-1], self.model.llm.max_positions
        require(
            longest <= limit, f"data.bucket_lengths ends with {longest}, longer than model.llm.max_positions {limit}"
        )
