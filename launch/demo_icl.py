"""In-context segmentation on a laptop: shapes that no training picture holds, drawn after one to three examples.

Run by `bash launch/demo.sh --icl`. Stage IV learns to draw the shape at a place that is named, and to name the place of
a mask. Stage V learns that the masks of examples name the place in question. In both the answer names it before <SEG>,
as "north <SEG>". A model that starts from nothing and answers <SEG> alone learns neither in so few steps: it draws all
shapes, whatever is asked. Every step leaves its result in OUT/icl and is skipped when it is there, so a second call
resumes. Figures stand in OUT/icl/metrics.json, examples beside queries and answers in OUT/icl/evaluation/report.html.
"""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from configs import eval_icl, stage4_moe, stage5_icl
from launch.demo_common import Stopwatch, announce, print_summary, report_sweep, train_stage
from medplib_jax.config.experiment import ExperimentConfig, InitConfig, LossConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.icl_form import EXAMPLES, QUESTION, REQUEST
from medplib_jax.data.images import load_mask
from medplib_jax.data.prompts import TEMPLATES
from medplib_jax.data.tokenizers import load_tokenizer, train_tokenizer
from medplib_jax.datasets.icl import IclOptions, make_icl
from medplib_jax.datasets.index import build, library_of_records
from medplib_jax.datasets.phantom import shapes
from medplib_jax.datasets.retrieve import retrieve
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.sweep import run_sweep

TRAIN_KINDS, TRAIN_PATIENTS = 100, 4
TEST_KINDS, TEST_PATIENTS = 8, 8
PATIENT = r"(k\d+p\d+)"  # in a picture's name
PIECES = 800  # at most, of the tokenizer
GAIN = 0.25  # in mDice that three examples are to bring over none
ABOUT = "generated shapes of forms that no training picture holds"
PLACES = (("northwest", "north", "northeast"), ("west", "centre", "east"), ("southwest", "south", "southeast"))
EVERYTHING = (".*",)
RATES, STEPS, LENGTHS = {"IV": 1.5e-3, "V": 1.5e-3}, {"IV": 600, "V": 400}, {"IV": 72, "V": 216}
LOSS = LossConfig(ce=3.0, dice=5.0, bce=2.0)


@dataclasses.dataclass(frozen=True)
class IclDemo:
    """The folder of the demonstration."""

    out: Path
    seed: int

    def data(self, split: str) -> Path:
        return self.out / "data" / split

    def records(self, split: str) -> Path:
        return self.data(split) / split / "icl.json"

    def asked(self, stage: str) -> Path:
        """The stage's training records."""
        return self.data("train") / "train" / {"IV": "named.json", "V": "shown.json"}[stage]

    @property
    def retrieved(self) -> Path:
        return self.data("test") / "test" / "icl_retrieved.json"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def evaluation(self) -> Path:
        return self.out / "evaluation"

    def workdir(self, stage: str) -> Path:
        return self.out / f"stage_{stage}"

    def experiment(self, stage: str) -> ExperimentConfig:
        """The stage's tiny experiment on this demonstration's data. All of the model trains."""
        config, steps = {"IV": stage4_moe, "V": stage5_icl}[stage].tiny(), STEPS[stage]
        llm = dataclasses.replace(stage5_icl.TINY.llm, vocab_size=load_tokenizer(str(self.tokenizer)).vocab_size)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(stage5_icl.TINY, llm=llm),
            data=dataclasses.replace(
                config.data,
                sources=(str(self.asked(stage)),),
                root=str(self.data("train")),
                tokenizer=str(self.tokenizer),
                bucket_lengths=(LENGTHS[stage],),
                max_regions=0,
                max_masks=1,
                mask_canvas=shapes.SIDE,
            ),
            optim=dataclasses.replace(
                config.optim, lr=RATES[stage], trainable=EVERYTHING, lr_scale=(), schedule="cosine"
            ),
            loss=LOSS,
            init=InitConfig(stage=4) if stage == "IV" else InitConfig(stage=5, base=str(self.workdir("IV"))),
            train=dataclasses.replace(config.train, steps=steps, checkpoint_every=steps, seed=self.seed),
        )


def run(demo: IclDemo, watch: Stopwatch) -> int:
    """0 when done, 130 or 143 when interrupted."""
    metrics_file = demo.out / "metrics.json"
    if metrics_file.exists():
        print(f"{demo.out} is finished; remove it to start anew.")
    else:
        announce("Shapes")
        make_data(demo)
        for stage in STEPS:
            announce(f"Stage {stage}")
            if status := train_stage(demo.experiment(stage), demo.workdir(stage)):
                return status
        announce("Evaluation")
        found = evaluate(demo) | watch.read()
        metrics_file.write_text(json.dumps(found, indent=1) + "\n")
    title = f"Shapes of forms that no training picture holds, after examples (to reach: a gain of {GAIN} by three):"
    print_summary(title, json.loads(metrics_file.read_text()), demo.evaluation / "report.html")
    return 0


def make_data(demo: IclDemo) -> None:
    """Pictures, records of both stages, and the tokenizer."""
    makes = {
        "train": (TRAIN_KINDS, TRAIN_PATIENTS, shapes.FORMS, 0.0),
        "test": (TEST_KINDS, TEST_PATIENTS, shapes.HELD_OUT_FORMS, 1.0),
    }
    for number, (split, (kinds, patients, forms, share)) in enumerate(makes.items()):
        pairs = demo.out / "pairs" / split
        shapes.generate_shapes(pairs, kinds, patients, forms, 2 * demo.seed + number)
        options = IclOptions(seed=demo.seed, test_share=share, patient=PATIENT)
        make_icl(str(pairs), str(demo.data(split)), options)
    said = set()
    for stage in STEPS:
        asked = training_records(demo, stage)
        demo.asked(stage).write_text(json.dumps(asked, indent=1) + "\n")
        said |= {turn["value"] for record in asked for turn in record["conversations"]}
    plain = {re.sub(f"<image>|<mask>.*</mask>|{EXAMPLES}", " ", text) for text in said}
    train_tokenizer([*texts(), *sorted(plain)] * 50, str(demo.tokenizer), PIECES)


def training_records(demo: IclDemo, stage: str) -> list[dict]:
    """The stage's records of every training target, as the module says."""
    records = []
    for record in json.loads(demo.records("train").read_text()):
        mask = record["target_mask"]
        pixels = load_mask(str(demo.data("train") / mask), (shapes.SIDE, shapes.SIDE))
        row, column = (int(3 * indices.mean() / shapes.SIDE) for indices in np.nonzero(pixels))
        place = PLACES[row][column]
        answer = f"{place} <SEG><mask>{mask}</mask>"
        if stage == "V":
            records.append(record | {"conversations": turns(QUESTION, answer)})
        else:
            named = turns(f"<image>\nPlease segment the shape in the {place}.", answer)
            records.append({"image": record["image"], "conversations": named})
            records.append({"image": mask, "conversations": turns(f"<image>\n{REQUEST}", answer)})
    return records


def turns(question: str, answer: str) -> list[dict]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def texts() -> list[str]:
    """What stands around every question."""
    frames = [f"{sentence} USER: ASSISTANT:" for sentence in TEMPLATES.values()]
    shown = [f"Example {number} image: \nExample {number} mask: \nQuery: \n{REQUEST}" for number in (1, 2, 3)]
    return [*frames, *shown]


def evaluate(demo: IclDemo) -> dict[str, float]:
    """mDice of every task by name, and with its 95 % interval the gains of three examples and of retrieved ones."""
    checkpoint, index = str(demo.workdir("V")), str(demo.out / "index")
    build(library_of_records(str(demo.records("test"))), index, checkpoint)
    retrieve(str(demo.records("test")), index, checkpoint, str(demo.retrieved))
    tasks = eval_icl.tasks(demo.data("test"), ABOUT)
    config = SweepConfig(checkpoints=checkpoint, tasks=tasks, max_new_tokens=4, on_error="raise")
    cells = {cell.task: cell for cell in run_sweep(config, demo.evaluation).of_models}
    report_sweep(demo.evaluation)
    dice = {}
    for name in (task.name for task in tasks):
        rows = read_rows(*(demo.evaluation / path for path in cells[name].predictions))
        dice[name] = np.array([row["scores"]["dice"] for row in sorted(rows, key=lambda row: row["record"])])
    found = {f"mDice, {name}": float(values.mean()) for name, values in dice.items()}
    gains = {
        "3 over 0 examples": dice["random-3"] - dice["random-0"],
        "retrieved over random": dice["retrieved-3"] - dice["random-3"],
    }
    for name, values in gains.items():
        low, high = interval(values)
        found |= {f"gain, {name}": float(values.mean()), f"gain, {name}, low": low, f"gain, {name}, high": high}
    return found


def interval(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The middle 95 % of the mean over records that are drawn again and again."""
    chosen = np.random.default_rng(0).integers(len(values), size=(draws, len(values)))
    low, high = np.quantile(values[chosen].mean(1), (0.025, 0.975))
    return float(low), float(high)
