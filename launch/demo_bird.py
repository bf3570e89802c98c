"""BiRD on a laptop: the phantom asked in Med-GRIT's form, one small model for all four tasks, held-out evaluation,
report.

Run by `bash launch/demo.sh --bird`. Every step leaves its result in OUT/bird and is skipped when it is there, so a
second call resumes. Figures stand in OUT/bird/metrics.json, drawn boxes in OUT/bird/evaluation/report.html.
"""

import dataclasses
import itertools
import json
from pathlib import Path

from configs import bird_grit
from launch.demo_common import Stopwatch, announce, print_summary, report_sweep, train_stage
from medplib_jax.config.experiment import ExperimentConfig, InitConfig
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.phantom import grit
from medplib_jax.datasets.train_ranks import conversation_texts, train_ranks
from medplib_jax.evaluate.kinds import refer_box
from medplib_jax.evaluate.result import SweepResult
from medplib_jax.evaluate.sweep import run_sweep

MODALITIES = ("ct", "mr", "x_ray", "ultrasound")  # as many as so small a model tells apart in so few steps
TEST_IMAGES = 208  # held-out pictures: at least 200 questions a task
# What each task is judged by, in protocol exact, and what the demo is to reach.
BARS = {
    "VG.recall_at_0.5": 0.80,
    "VG.box_iou": 0.65,
    "ROC.roc_accuracy": 0.90,
    "RC.exact_match": 0.85,
    "MIA.exact_match": 0.90,
}


@dataclasses.dataclass(frozen=True)
class BirdDemo:
    """The folder of the demonstration and how many pictures it trains on."""

    out: Path
    examples: int
    seed: int

    @property
    def data(self) -> Path:
        return self.out / "phantom"

    @property
    def model(self) -> Path:
        return self.out / "model"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluation"

    def experiments(self) -> dict[Path, ExperimentConfig]:
        """The tiny experiments with their paths in the demo's folder, by the folder of their result.

        The second begins where the first ended.
        """
        rough = self.out / "rough"
        tiny = dataclasses.replace(self._placed(bird_grit.tiny()), init=InitConfig(base=str(rough)))
        return {rough: self._placed(bird_grit.rough()), self.model: tiny}

    def _placed(self, config: ExperimentConfig) -> ExperimentConfig:
        sources = tuple(source.replace(f"{bird_grit.DEMO}/phantom", str(self.data)) for source in config.data.sources)
        data = dataclasses.replace(config.data, sources=sources, root=str(self.data), tokenizer=str(self.tokenizer))
        return dataclasses.replace(config, data=data, train=dataclasses.replace(config.train, seed=self.seed))

    def sweep(self) -> SweepConfig:
        tasks = [
            TaskConfig(
                part,
                str(self.data / grit.file_of("test", part)),
                root=str(self.data),
                kind="refer_box",
                part=part,
                about="generated pictures",
            )
            for part in refer_box.PARTS
        ]
        return SweepConfig(checkpoints=str(self.model), tasks=tuple(tasks), on_error="raise")


def run(demo: BirdDemo, watch: Stopwatch) -> int:
    """0 when done, 130 or 143 when interrupted."""
    metrics = demo.out / "metrics.json"
    if metrics.exists():
        print(f"{demo.out} is finished; remove it to start anew.")
    else:
        announce("Phantom dataset in Med-GRIT's form")
        phantom.generate(demo.data, demo.examples, TEST_IMAGES, demo.seed, modalities=MODALITIES)
        grit.write_grit(demo.data, demo.seed)
        make_tokenizer(demo)
        for workdir, experiment in demo.experiments().items():
            announce(f"Training: {workdir.name}")
            if status := train_stage(experiment, workdir):
                return status
        announce("Evaluation")
        found = headline(run_sweep(demo.sweep(), demo.evaluation))
        report_sweep(demo.evaluation)
        metrics.write_text(json.dumps(found | watch.read(), indent=1) + "\n")
    found = {with_bar(name): value for name, value in json.loads(metrics.read_text()).items()}
    print_summary("Held-out phantom questions in Med-GRIT's form:", found, demo.evaluation / "report.html")
    return 0


def make_tokenizer(demo: BirdDemo) -> None:
    if not (demo.tokenizer / "qwen.tiktoken").exists():
        files = (open_source(str(demo.data / name), str(demo.data)) for name in (grit.LOOK, grit.FIND))
        train_ranks(conversation_texts(itertools.chain(*files)), str(demo.tokenizer))


def headline(result: SweepResult) -> dict[str, float]:
    """{task.metric: value} of the figures that have a bar, and how many records each task asked."""
    found = {f"{cell.task}.{name}": value for cell in result.of_models for name, value in cell.metrics.items()}
    records = {f"{cell.task}.records": cell.records for cell in result.of_models}
    return {name: found[name] for name in BARS} | records


def with_bar(name: str) -> str:
    return f"{name} (>= {BARS[name]:.2f})" if name in BARS else name
