"""One experiment: the model and all around it, as frozen dataclasses. `configs/*.py` build one, flags change it."""

import dataclasses
import re
from typing import ClassVar, Literal

from medplib_jax.config.base import NotNegative, Positive, Section, Share, require
from medplib_jax.config.model import ModelConfig

TEMPLATES = {"medplib": ("llava_v1", "v1"), "bird": ("chatml", "qwen_raw")}  # by model.family


@dataclasses.dataclass(frozen=True)
class DataConfig(Section, name="data"):
    """What is read and how it becomes batches of static shape.

    `sources` are annotation files in MeCoVQA's form, or datasets assembled from them (FOLDER#SPLIT). `weights` are
    their shares of the mixture (empty: by size). With `pack` a row holds several conversations without masks, as far
    as the longest bucket and the slots for images and regions hold them. `region_augmentation` trains on a random part
    of each region, "reference" with the original's slip.
    """

    sources: tuple[str, ...] = ()
    weights: tuple[NotNegative[float], ...] = ()
    root: str = ""  # folder where the paths inside the sources start; empty: the folder of each source
    tokenizer: str = ""
    template: Literal["llava_v1", "v1", "chatml", "qwen_raw"] = "llava_v1"  # see TEMPLATES; MedPLIB evaluates with v1
    bucket_lengths: tuple[Positive[int], ...] = (1024,)  # final lengths, image tokens included
    batch_size: Positive[int] = 128  # global
    pack: bool = False
    max_images: Positive[int] = 1
    max_regions: NotNegative[int] = 1
    max_masks: NotNegative[int] = 1  # 0: no mask slots, the mask head is not run
    mask_canvas: Positive[int] = 1024  # masks longer than this are shrunk to fit
    cache: str = ""  # folder of resized pictures, masks and regions, kept for later runs; empty: in memory only
    region_augmentation: Literal["none", "exact", "reference"] = (
        "none"  # train on a random part of each region; as the original
    )
    on_error: Literal["raise", "skip"] = "raise"  # skip: count and name the record, take another one
    workers: NotNegative[int] = 2

    def __post_init__(self):
        super().__post_init__()
        require(
            not self.weights or len(self.weights) == len(self.sources),
            f"data.weights has {len(self.weights)} entries for {len(self.sources)} data.sources",
        )
        require(not self.weights or sum(self.weights) > 0, f"data.weights {self.weights} are all 0")
        require(
            self.bucket_lengths == tuple(sorted(set(self.bucket_lengths))) and len(self.bucket_lengths) > 0,
            f"data.bucket_lengths {self.bucket_lengths} must ascend",
        )


@dataclasses.dataclass(frozen=True)
class OptimConfig(Section, name="optim"):
    """AdamW with clipping by global norm. `trainable` are regular expressions searched in parameter paths."""

    lr: NotNegative[float] = 3e-4
    b1: Share = 0.9
    b2: Share = 0.95
    eps: Positive[float] = 1e-8
    weight_decay: NotNegative[float] = 0.0
    no_decay: tuple[str, ...] = ()  # path patterns of trainable parameters that weight decay spares
    clip_norm: Positive[float] = 1.0
    warmup: NotNegative[float] = 0.01  # share of ONE epoch's steps, at least 2 steps; with "cosine" of the run
    schedule: Literal["exact", "reference", "cosine"] = "exact"  # reference: MedPLIB's first step runs at full rate
    trainable: tuple[str, ...] = (".*",)
    lr_scale: tuple[tuple[str, float], ...] = ()  # (path pattern, factor); the first match counts
    accumulate: Positive[int] = 1
    frozen_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        super().__post_init__()
        scales = tuple((pattern, float(factor)) for pattern, factor in self.lr_scale)
        object.__setattr__(self, "lr_scale", scales)
        for pattern, factor in scales:
            require(factor >= 0, f"optim.lr_scale of {pattern!r} is {factor}, which is not at least 0")
        for pattern in (*self.trainable, *self.no_decay, *(pattern for pattern, _ in self.lr_scale)):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"optim pattern {pattern!r} is not a regular expression: {error}") from error


@dataclasses.dataclass(frozen=True)
class LossConfig(Section, name="loss"):
    """Weights of the loss terms (spec: the stages' table)."""

    ce: NotNegative[float] = 1.0
    dice: NotNegative[float] = 0.0
    bce: NotNegative[float] = 0.0
    focal: NotNegative[float] = 0.0
    iou: NotNegative[float] = 0.0
    ce_chunk: Positive[int] = 64  # positions of each row whose logits exist at a time, so that [B, L, V] never does


@dataclasses.dataclass(frozen=True)
class MeshConfig(Section, name="mesh"):
    """Sizes of the mesh axes, one of which may be -1: whatever is left.

    Rows of a batch are spread over data, fsdp and expert, parameters as `ShardingConfig` says. `dcn_data` is the number
    of TPU slices, or of groups of GPU nodes, with a slow network between them. The mesh then has dcn_data * data
    devices along the data axis, and only this axis runs over the slow network.
    """

    AXES: ClassVar = ("data", "fsdp", "expert", "tensor")

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    dcn_data: Positive[int] = 1

    def __post_init__(self):
        super().__post_init__()
        require(
            all(size == -1 or size >= 1 for size in self.sizes) and self.sizes.count(-1) <= 1,
            f"mesh.data, fsdp, expert and tensor are {self.sizes}: they must be positive, at most one of them -1",
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.data, self.fsdp, self.expert, self.tensor


@dataclasses.dataclass(frozen=True)
class ShardingConfig(Section, name="sharding"):
    """Over which mesh axes each logical axis of a parameter is spread: names joined by commas; "" keeps it whole."""

    embed: str = "fsdp"
    heads: str = "tensor"
    kv_heads: str = "tensor"
    mlp: str = "tensor"
    expert: str = "expert"
    vocab: str = ""  # 32,267 = 41 x 787 divides by no mesh; the embedding is spread along its width instead
    vision: str = ""  # CLIP and SAM: 0.4 B frozen parameters
    vision_out: str = ""  # the decoder's width, where the vision part ends
    layers: str = ""
    lora_embed: str = ""  # the model's width in an adapter
    lora_rank: str = ""
    norm: str = ""

    def __post_init__(self):
        super().__post_init__()
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
class InitConfig(Section, name="init"):
    """Where parameters come from. Each is a checkpoint directory (workdir of an earlier stage); empty: random."""

    stage: int = 0  # 1 align, 2 visual-language expert, 3 grounding expert, 4 MoE, 5 in context; 0: a fine-tuning
    base: str = ""
    grounding: str = ""  # stage IV: expert 0, SEG MLP and mask head come from here
    sizes: Literal["config", "base"] = "config"  # base: the model's sizes are those of `base`, whatever `model` says

    def __post_init__(self):
        super().__post_init__()
        require(0 <= self.stage <= 5, f"init.stage {self.stage} is outside [0, 5]")
        require(self.stage == 4 or not self.grounding, "init.grounding is read by stage 4 only")


@dataclasses.dataclass(frozen=True)
class TrainConfig(Section, name="train"):
    """Length of the run and what is written when. `steps` wins over `epochs` when positive.

    Every `eval_every` steps the run is evaluated on `eval.sources`: the held-out loss as `eval/loss`, and for the files
    named in `eval_tasks` the metrics of answers as `eval/FILE/METRIC`, where FILE is the name without its suffix.

    Checkpoints that stay: the newest `keep`, and the `keep_best` whose figure `keep_best_by` is `keep_best_is`. Without
    `eval_every` the figure is the mean training loss since the checkpoint before. A run in which no step begins for
    `hang_seconds` (compiling counts) ends, to be started again.
    """

    steps: NotNegative[int] = 0
    epochs: Positive[float] = 1.0
    seed: NotNegative[int] = 0
    log_every: Positive[int] = 10
    checkpoint_every: Positive[int] = 500
    keep: Positive[int] = 2
    keep_best: NotNegative[int] = 0
    keep_best_by: str = "eval/loss"
    keep_best_is: Literal["lowest", "highest"] = "lowest"
    eval_every: NotNegative[int] = 0  # steps between evaluations; 0: none
    eval_tasks: tuple[str, ...] = ()
    eval_records: Positive[int] = 64  # of each source that an evaluation reads
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)  # beside metrics.jsonl
    profile: str = ""  # START:STOP, steps counted from 0: a trace of these in WORKDIR/profile
    hang_seconds: Positive[float] = 3600.0

    def __post_init__(self):
        super().__post_init__()
        steps = self.profile_steps
        require(steps is None or steps[0] < steps[1], f"train.profile {self.profile!r}: STOP must be above START")
        chosen = self.eval_tasks or self.keep_best_by != "eval/loss"
        require(self.eval_every > 0 or not chosen, "train.eval_tasks and keep_best_by are read with eval_every only")

    @property
    def profile_steps(self) -> tuple[int, int] | None:
        """The steps [START, STOP) to trace."""
        match = re.fullmatch(r"(\d+):(\d+)", self.profile)
        require(match is not None or not self.profile, f"train.profile {self.profile!r} is not START:STOP")
        return (int(match[1]), int(match[2])) if match else None


@dataclasses.dataclass(frozen=True)
class EvalConfig(Section, name="eval"):
    """Held-out evaluation. `sources` are annotation files, or FOLDER#SPLIT of assembled datasets."""

    sources: tuple[str, ...] = ()
    batch_size: Positive[int] = 16  # answers in the making per device
    max_new_tokens: Positive[int] = 64
    mask_threshold: float = 0.5  # on the sigmoid; the original evaluates at 0.1

    def __post_init__(self):
        super().__post_init__()
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
        family, data = self.model.family, self.data
        require(
            data.template in TEMPLATES[family],
            f"data.template {data.template!r}: model.family {family!r} reads {TEMPLATES[family]}",
        )
        require(
            self.model.draws_masks or not (data.max_masks or data.max_regions),
            f"model.family {family!r} has boxes in its text: data.max_masks and data.max_regions must be 0",
        )
        longest, limit = self.data.bucket_lengths[-1], self.model.llm.max_positions
        require(
            longest <= limit, f"data.bucket_lengths ends with {longest}, longer than model.llm.max_positions {limit}"
        )
