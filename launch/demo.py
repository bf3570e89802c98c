"""The whole system on a laptop: data, four training stages, evaluation, report. Run by launch/demo.sh.

Every step leaves its result in the output folder and is skipped when it is there, so a second call resumes. Figures of
the run stand in metrics.json, everything else in report.html.
"""

import argparse
import dataclasses
import datetime
import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import absl.logging
import jax
import numpy as np

from configs import stage1_align, stage2_vqa, stage3_grounding, stage4_moe
from launch import demo_bird, demo_icl
from launch.demo_common import Stopwatch, announce, print_summary, report_sweep, train_stage
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.data.images import load_image
from medplib_jax.data.rle import decode_rle
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.datasets.train_tokenizer import build_tokenizer
from medplib_jax.evaluate import report
from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.provenance import commit
from medplib_jax.evaluate.report.comparisons import ALL, compare
from medplib_jax.evaluate.report.sweep_load import load_sweep
from medplib_jax.evaluate.report.sweep_tables import entry
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.parallel.compilation import use_cache
from medplib_jax.train.metrics_log import read_metrics

STAGES = {
    "I align": stage1_align,
    "II visual-language": stage2_vqa,
    "III grounding": stage3_grounding,
    "IV mixture": stage4_moe,
}
# Which test files each stage's model answers: what it was trained for, and what the next stage is to improve.
TESTS = {
    "I align": ("complex",),
    "II visual-language": ("complex", "region", "grounding"),
    "III grounding": ("grounding",),
    "IV mixture": ("complex", "region", "grounding"),
}
SWEPT = ("II visual-language", "III grounding", "IV mixture")  # put to all tasks by --sweep
GALLERY_SCORES = {  # score: how the page calls it
    "dice": "Dice",
    "iou": "IoU",
    "closed_accuracy": "right",
    "open_exact_match": "word for word",
    "open_f1": "F1 of words",
}
CURVES = ("loss", "ce", "dice", "bce")
BARS = {  # figure: how the page calls it, its task, its metric
    "grounding.mdice": ("masks, mDice", "grounding", "mDice"),
    "no_target.accuracy": ("nothing is there: no mask", "grounding", "no_target_accuracy"),
    "region_vqa.accuracy": ("questions about a region", "region", "accuracy"),
    "closed_vqa.accuracy": ("closed questions", "complex", "closed_accuracy"),
    "open_vqa.accuracy": ("open questions, word for word", "complex", "open_exact_match"),
}


@dataclasses.dataclass(frozen=True)
class Demo:
    """Sizes of the demonstration and the folder it works in."""

    out: Path
    examples: int
    test_examples: int
    seed: int

    @property
    def data(self) -> Path:
        return self.out / "phantom"

    @property
    def tokenizer(self) -> Path:
        return self.out / "tokenizer"

    @property
    def evaluation(self) -> Path:
        """One sweep's folder for all stages."""
        return self.out / "evaluation"

    @property
    def absent(self) -> Path:
        """The held-out questions for something that is not there."""
        return self.out / "absent.json"

    def task(self, name: str) -> TaskConfig:
        file = self.absent if name == "absent" else self.data / phantom.FILES["test"][name]
        kind = {"complex": "vqa", "absent": "grounding"}.get(name, name)
        train = self.data / phantom.FILES["train"]["grounding" if name == "absent" else name]
        about = "generated pictures"
        return TaskConfig(name, str(file), root=str(self.data), kind=kind, about=about, train=str(train))

    def workdir(self, stage: str) -> Path:
        return self.out / f"stage_{stage.split()[0]}"

    def experiment(self, stage: str) -> ExperimentConfig:
        """The stage's tiny experiment, with its paths in the demo's folder."""
        config = STAGES[stage].tiny()
        sources = tuple(str(self.data / "train" / Path(source).name) for source in config.data.sources)
        init = dataclasses.replace(
            config.init,
            base=str(self.workdir("II" if config.init.stage == 4 else "I" * (config.init.stage - 1)))
            if config.init.base
            else "",
            grounding=str(self.workdir("III")) if config.init.grounding else "",
        )
        return dataclasses.replace(
            config,
            data=dataclasses.replace(config.data, sources=sources, root=str(self.data), tokenizer=str(self.tokenizer)),
            init=init,
            train=dataclasses.replace(config.train, seed=self.seed),
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="launch/demo.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--examples", type=int, default=3000, help="training images to generate")
    parser.add_argument(
        "--test-examples",
        type=int,
        default=100,
        help="held-out images; each has 3 questions, 2 about regions, 3 to ground",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="afterwards, put every task to the models of stages II to IV and compare them in one report",
    )
    parser.add_argument(
        "--bird", action="store_true", help="instead, train and evaluate a small BiRD, which answers with boxes"
    )
    parser.add_argument(
        "--icl", action="store_true", help="instead, train a small model to draw what examples show, and evaluate it"
    )
    parser.add_argument("--serve", action="store_true", help="afterwards, serve the model of stage IV to a browser")
    arguments = vars(parser.parse_args())
    with_sweep, with_bird, with_icl = (arguments.pop(name) for name in ("sweep", "bird", "icl"))
    with_server = arguments.pop("serve")
    demo = Demo(**arguments)
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax's remarks
    logging.getLogger("medplib_jax").setLevel(logging.INFO)
    jax.config.update("jax_compilation_cache_dir", str((demo.out / "compiled").resolve()))
    use_cache()
    out = demo.out / ("bird" if with_bird else "icl" if with_icl else "")
    out.mkdir(parents=True, exist_ok=True)
    watch = Stopwatch(out / "stopwatch.json")
    try:
        if with_bird:
            return demo_bird.run(demo_bird.BirdDemo(out, demo.examples, demo.seed), watch)
        if with_icl:
            return demo_icl.run(demo_icl.IclDemo(out, demo.seed), watch)
        code = run(demo, watch)
        if with_sweep and code == 0:
            code = sweep(demo)
        return serve(demo) if with_server and code == 0 else code
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command to resume.", file=sys.stderr)
        return 130
    finally:
        watch.save()


def run(demo: Demo, watch: Stopwatch) -> int:
    if (demo.out / "metrics.json").exists():
        print(f"{demo.out} is finished; remove it to start anew.")
    else:
        announce("Phantom dataset")
        phantom.generate(demo.data, demo.examples, demo.test_examples, demo.seed)
        make_tokenizer(demo)
        results = {}
        for stage in STAGES:
            announce(f"Stage {stage}")
            if status := train_stage(demo.experiment(stage), demo.workdir(stage)):
                return status
            results[stage] = evaluate(demo, stage)
            if stage == "III grounding":
                print(f"The first masks, while stage IV trains: {report_sweep(demo.evaluation)}", file=sys.stderr)
        announce("Report")
        metrics = flat_metrics(results)
        write(demo, results, metrics, watch)
    metrics = json.loads((demo.out / "metrics.json").read_text())
    final = {name: value for name, value in metrics.items() if not name.startswith("stage_")}
    print_summary("Held-out phantom examples, final model:", final, demo.out / "report.html")
    return 0


def evaluate(demo: Demo, stage: str) -> dict[str, dict]:
    """{task: its cell of the sweep} of a stage's model on the tasks that it was trained for."""
    tasks = tuple(demo.task(name) for name in TESTS[stage])
    result = run_sweep(
        SweepConfig(checkpoints=str(demo.workdir(stage)), tasks=tasks, on_error="raise"), demo.evaluation
    )
    own = [checkpoint for checkpoint in result.checkpoints if checkpoint.run == demo.workdir(stage).name]
    name = max(own, key=lambda checkpoint: checkpoint.step or 0).name
    return {
        cell.task: dataclasses.asdict(cell)
        for cell in result.cells
        if cell.checkpoint == name and cell.task in TESTS[stage]
    }


def sweep(demo: Demo) -> int:
    """The models of stages II to IV on every task, in the folder of the stages' own evaluation.

    Questions for what is not there are a task of their own.
    """
    announce("Sweep")
    records = json.loads((demo.data / phantom.FILES["test"]["grounding"]).read_text())
    demo.absent.write_text(
        json.dumps([record for record in records if "<mask>" not in record["conversations"][-1]["value"]])
    )
    checkpoints = ",".join(str(demo.workdir(stage)) for stage in SWEPT)
    tasks = tuple(demo.task(name) for name in (*phantom.FILES["test"], "absent"))
    run_sweep(SweepConfig(checkpoints=checkpoints, tasks=tasks, on_error="raise"), demo.evaluation)
    print(f"\nReport of the sweep: {report_sweep(demo.evaluation)}")
    return 0


def serve(demo: Demo) -> int:
    """Serves the last stage's model until Ctrl-C, with the demo's pictures as examples."""
    announce("Server")
    command = [sys.executable, "-m", "medplib_jax.serve", "--checkpoint", str(demo.workdir("IV mixture")), "--open"]
    command += ["--examples", str(demo.data / "images" / "*--test_*"), "--max-new-tokens", "64"]
    return subprocess.call(command)


def make_tokenizer(demo: Demo) -> None:
    if not (demo.tokenizer / "tokenizer.model").exists():
        build_tokenizer([str(demo.data / name) for name in phantom.FILES["train"].values()], str(demo.tokenizer))


def flat_metrics(results: dict[str, dict]) -> dict[str, float]:
    """The final model's figures by name, and what each stage reached on its way as `stage_<number>.<name>`."""
    flat = headline(results["IV mixture"])
    for stage, result in results.items():
        flat |= {f"stage_{stage.split()[0]}.{name}": value for name, value in headline(result).items()}
    return flat


def headline(cells: dict[str, dict]) -> dict[str, float]:
    """The figures of one model by name.

    grounding.mdice, no_target.accuracy, region_vqa.accuracy, closed_vqa.accuracy, open_vqa.accuracy, ...
    """
    flat = {}
    if "grounding" in cells:
        found = cells["grounding"]["metrics"]
        flat |= {f"grounding.{name.lower()}": found[name] for name in ("mDice", "mIoU", "gIoU", "cIoU")}
        flat |= {
            "no_target.accuracy": found["no_target_accuracy"],
            "no_target.false_mask_rate": found["false_mask_rate"],
        }
    if "complex" in cells:
        found = cells["complex"]["metrics"]
        flat |= {"closed_vqa.accuracy": found["closed_accuracy"], "open_vqa.accuracy": found["open_exact_match"]}
    if "region" in cells:
        flat |= {"region_vqa.accuracy": cells["region"]["metrics"]["accuracy"]}
    return flat | {f"{name}.records": cell["records"] for name, cell in cells.items()}


def write(demo: Demo, results: dict[str, dict], metrics: dict[str, float], watch: Stopwatch) -> None:
    """report.html with its pictures, then metrics.json (whose presence says that the demo is finished)."""
    final = results["IV mixture"]
    curves = {stage: curve(read_metrics(str(demo.workdir(stage)))) for stage in STAGES}
    report.write_report(
        report.ReportData(
            title="MedPLIB on a laptop: four stages on a generated dataset",
            drawings=True,
            facts=facts(demo, watch),
            curves=curves,
            tables={
                "Final model, by modality": by_modality(final),
                "All stages: percent, with 95 % intervals": in_words(demo, results),
            },
            stages=comparisons(results),
            router=router(final["grounding"]["router"]),
            examples=[example for name, cell in final.items() for example in examples(demo, name, cell, count=12)],
        ),
        demo.out,
    )
    (demo.out / "metrics.json").write_text(json.dumps(metrics | watch.read(), indent=1) + "\n")


def curve(rows: list[dict[str, float]]) -> dict[str, list[float]]:
    names = [name for name in CURVES if any(row.get(name) for row in rows)]
    return {name: [row[name] for row in rows] for name in ("step", *names)}


def router(split: dict) -> report.Router:
    """The router split of a cell as the report shows it."""
    experts = [f"expert {i}" for i in range(len(next(iter(split["share"].values()))[0]))]
    return report.Router(
        split["layers"], list(split["share"]), experts, np.stack(list(split["share"].values()), axis=1)
    )


def examples(demo: Demo, name: str, cell: dict, count: int) -> Iterator[report.ReportExample]:
    """Questions and answers for the report's gallery, spread evenly over a cell's records."""
    source = MecovqaSource(demo.task(name).file, str(demo.data))
    rows = read_rows(*(demo.evaluation / path for path in cell["predictions"]))
    for row in rows[:: max(1, len(rows) // count)][:count]:
        record = source[row["record"]]
        path = record.path(record.images[-1])
        yield report.ReportExample(
            image=path,
            task=demo.task(name).kind,
            modality=row["modality"],
            question=row["question"],
            answer=row["answer"],
            expected=row["expected"],
            scores={name: row["scores"][score] for score, name in GALLERY_SCORES.items() if score in row["scores"]},
            true_masks=[decode_rle(rle) for rle in row.get("true_masks", ())],
            masks=[decode_rle(rle) for rle in row.get("masks", ())],
            region_masks=report.region_masks(record, load_image(path).shape[:2]),
        )


def by_modality(cells: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{modality: {metric: value}} of the figures that every task reports by modality."""
    columns = {
        ("grounding", "mDice"): "mDice",
        ("grounding", "no_target_accuracy"): "no target",
        ("complex", "closed_accuracy"): "closed",
        ("complex", "open_exact_match"): "open",
        ("region", "accuracy"): "region",
    }
    table: dict[str, dict[str, float]] = {}
    for task, cell in cells.items():
        for name, value in cell["metrics"].items():
            metric, _, modality = name.partition("/")
            if modality and (task, metric) in columns:
                table.setdefault(modality, {})[columns[task, metric]] = value
    return table


def comparisons(results: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{metric: {stage: value}} for the bars that show what each stage brought; NaN where a stage is not asked."""
    found = {stage: headline(result) for stage, result in results.items()}
    return {
        words: {stage: values.get(name, math.nan) for stage, values in found.items()}
        for name, (words, *_) in BARS.items()
    }


def in_words(demo: Demo, results: dict[str, dict]) -> dict[str, dict[str, str]]:
    """{stage: {figure: "percent (interval)"}} of the figures that have a bar; those of a stage that is not asked are
    left out.
    """
    found = {
        (figure.checkpoint, figure.task, figure.metric): figure
        for figure in compare(load_sweep(demo.evaluation))
        if figure.modality == ALL
    }
    table: dict[str, dict[str, str]] = {}
    for stage, cells in results.items():
        for words, task, metric in BARS.values():
            figure = found.get((cells[task]["checkpoint"], task, metric)) if task in cells else None
            if figure is not None:
                shown = entry(figure, best=False)
                spread = f" ({shown.interval})" if shown.interval else ""
                table.setdefault(stage, {})[words] = f"{shown.value}{spread}, n = {figure.records}"
    return table


def facts(demo: Demo, watch: Stopwatch) -> dict[str, object]:
    used = watch.read()
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit() or "not known",
        "training images": demo.examples,
        "held-out images": demo.test_examples,
        "seed": demo.seed,
        "minutes": f"{used['wall_seconds'] / 60:.1f}",
        "memory peak": f"{used['peak_rss_gb']:.1f} GB",
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
