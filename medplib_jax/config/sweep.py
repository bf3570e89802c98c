"""One evaluation sweep: which checkpoints are put to which tasks, and how."""

import dataclasses
import fnmatch

from medplib_jax.config.base import from_dict, require
from medplib_jax.config.experiment import MeshConfig, ShardingConfig

TASK_KINDS = ("grounding", "region", "vqa", "refer_box")
TASK_PARTS = ("VG", "ROC", "RC", "MIA")  # of Med-GRIT, whose tasks are scored each in its own way


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """One annotation file in MeCoVQA's form that a sweep asks."""

    name: str
    file: str
    root: str = ""  # folder where the paths inside start; empty: found from where `images` lies
    kind: str = ""  # of TASK_KINDS; empty: found from the records
    part: str = ""  # of TASK_PARTS, for refer_box
    about: str = ""  # where the data is from

    def __post_init__(self):
        require(self.kind in ("", *TASK_KINDS), f"task {self.name}: kind {self.kind!r} is not one of {TASK_KINDS}")
        require(self.part in ("", *TASK_PARTS), f"task {self.name}: part {self.part!r} is not one of {TASK_PARTS}")
        require(
            "/" not in self.name and self.name not in ("", ".", ".."), f"task name {self.name!r} is not a file name"
        )


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """Checkpoints x tasks x protocols. Every process takes whole shards of a task's records; its own devices hold the model (`mesh`).

    `checkpoints`: comma-separated paths, `*` allowed: workdirs of training runs, single steps (WORKDIR/checkpoints/STEP), or folders of PyTorch
    weights. Numbers that are 0 come from each experiment's `eval`.
    """

    checkpoints: str = ""
    steps: str = "newest"  # or "all" complete steps of each workdir
    baseline: str = ""  # name of the checkpoint that the report compares with; empty: none
    tasks: tuple[TaskConfig, ...] = ()
    select: str = "*"  # comma-separated patterns of task names
    protocol: str = "exact"  # or "reference", or "both"
    limit: int = 0  # usable records per task; 0: all
    max_new_tokens: int = 0
    mask_threshold: float = 0.0  # of protocol exact
    slots: int = 0  # answers in the making per device
    refill: int = 0  # prompts run at a time per device; 0: half as many as slots
    shard: int = 128  # records per file of predictions
    on_error: str = "skip"  # a record that cannot be used; or "raise"
    missing: str = "skip"  # a task whose file is not there; or "raise"
    quantize: str = ""  # or "int8": weights of 8 bits
    mesh: MeshConfig = MeshConfig()
    sharding: ShardingConfig = ShardingConfig()  # of the parameters on this mesh

    def __post_init__(self):
        tasks = tuple(
            task if isinstance(task, TaskConfig) else from_dict(TaskConfig, dict(task)) for task in self.tasks
        )
        object.__setattr__(self, "tasks", tasks)
        require(self.steps in ("newest", "all"), f"steps {self.steps!r} is neither 'newest' nor 'all'")
        require(
            self.protocol in ("exact", "reference", "both"),
            f"protocol {self.protocol!r} is not 'exact', 'reference' or 'both'",
        )
        require(self.on_error in ("raise", "skip"), f"on_error {self.on_error!r} is neither 'raise' nor 'skip'")
        require(self.missing in ("raise", "skip"), f"missing {self.missing!r} is neither 'raise' nor 'skip'")
        require(self.quantize in ("", "int8"), f"quantize {self.quantize!r} is neither '' nor 'int8'")
        require(self.shard >= 1, f"shard {self.shard} is below 1")
        require(
            min(self.limit, self.max_new_tokens, self.slots, self.refill) >= 0,
            "limit, max_new_tokens, slots and refill must not be negative",
        )
        require(0.0 <= self.mask_threshold < 1.0, f"mask_threshold {self.mask_threshold} is outside [0, 1)")

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
