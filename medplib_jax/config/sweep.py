"""One evaluation sweep: which checkpoints are put to which tasks, and how."""

import dataclasses
import fnmatch
from typing import Literal

from medplib_jax.config.base import NotNegative, Positive, Section, Share, from_dict, require
from medplib_jax.config.experiment import MeshConfig, ShardingConfig


@dataclasses.dataclass(frozen=True)
class TaskConfig(Section):
    """One annotation file in MeCoVQA's form that a sweep asks."""

    name: str
    file: str
    root: str = ""  # folder where the paths inside start; empty: found from where `images` lies
    kind: str = ""  # of `evaluate.kinds`; empty: found from the records
    part: str = ""  # of a kind that has parts, as VG of refer_box
    shots: NotNegative[int] = 3  # most examples that are shown, for icl
    about: str = ""  # where the data is from
    train: str = ""  # annotation file of the training set, for comparisons with its majority and its mean box

    def __post_init__(self):
        super().__post_init__()
        require(
            "/" not in self.name and self.name not in ("", ".", ".."), f"task name {self.name!r} is not a file name"
        )


@dataclasses.dataclass(frozen=True)
class SweepConfig(Section):
    """Checkpoints x tasks x protocols. Every process takes whole shards of a task's records, on its own devices.

    `checkpoints` are comma-separated paths, `*` allowed: workdirs of training runs, single steps
    (WORKDIR/checkpoints/STEP), or folders of PyTorch weights. Numbers that are 0 come from each experiment's `eval`.
    """

    checkpoints: str = ""
    steps: Literal["newest", "all"] = "newest"  # complete steps of each workdir
    baseline: str = ""  # name of the checkpoint that the report compares with; empty: none
    tasks: tuple[TaskConfig, ...] = ()
    select: str = "*"  # comma-separated patterns of task names
    protocol: Literal["exact", "reference", "both"] = "exact"
    limit: NotNegative[int] = 0  # usable records per task; 0: all
    max_new_tokens: NotNegative[int] = 0
    mask_threshold: Share = 0.0  # of protocol exact
    slots: NotNegative[int] = 0  # answers in the making per device
    refill: NotNegative[int] = 0  # prompts run at a time per device; 0: half as many as slots
    shard: Positive[int] = 128  # records per file of predictions
    on_error: Literal["skip", "raise"] = "skip"  # at a record that cannot be used
    missing: Literal["skip", "raise"] = "skip"  # at a task whose file is not there
    metrics: str = ""  # of one's own: comma-separated files and entry points, see `evaluate.own`
    quantize: Literal["", "int8", "kv", "int8+kv", "w8a8", "w8a8+kv"] = ""  # what has 8 bits, see `decode.layout`
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()  # of the parameters on this mesh

    def __post_init__(self):
        tasks = tuple(
            task if isinstance(task, TaskConfig) else from_dict(TaskConfig, dict(task)) for task in self.tasks
        )
        object.__setattr__(self, "tasks", tasks)
        super().__post_init__()

    @property
    def protocols(self) -> tuple[str, ...]:
        return ("exact", "reference") if self.protocol == "both" else (self.protocol,)

    @property
    def selected(self) -> tuple[TaskConfig, ...]:
        return tuple(
            task
            for task in self.tasks
            if any(fnmatch.fnmatch(task.name, pattern) for pattern in self.select.split(","))
        )
