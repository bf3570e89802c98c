"""Evaluates a checkpoint on annotation files: grounding, region questions and other questions, whichever each file holds.

COMMAND
    python -m medplib_jax.evaluate --checkpoint WORKDIR --data data/phantom --out results

Writes `<out>/<task>.jsonl` (a line per record; a killed run goes on where it stopped), `<out>/metrics.json` and `<out>/report.html`.
"""

import argparse
import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax import report
from medplib_jax.checkpoint import load_params
from medplib_jax.config import LoraConfig
from medplib_jax.data.errors import DataError
from medplib_jax.data.images import load_image
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.sources import MASK, REGION, MecovqaSource
from medplib_jax.data.tokenizer import Tokenizer
from medplib_jax.decode import Generator
from medplib_jax.evaluators import router
from medplib_jax.evaluators.common import Evaluator, decode_rle, mask_drawer
from medplib_jax.evaluators.grounding import GroundingEvaluator
from medplib_jax.evaluators.region import RegionVqaEvaluator
from medplib_jax.evaluators.vqa import VqaEvaluator
from medplib_jax.experiment import EvalConfig, ExperimentConfig
from medplib_jax.metrics import PROTOCOLS
from medplib_jax.models.lora import merge_lora
from medplib_jax.types import Params

EVALUATORS: dict[str, type[Evaluator]] = {"grounding": GroundingEvaluator, "region": RegionVqaEvaluator, "vqa": VqaEvaluator}
GALLERY_SCORES = ("dice", "iou", "closed_accuracy", "open_exact_match", "open_f1")


@dataclasses.dataclass(frozen=True)
class Survey:
    """What an annotation file holds. `kind`: grounding when any answer has a mask, else region when any question has one, else vqa."""

    kind: str
    usable: tuple[int, ...]  # records that have an expected answer
    skipped: tuple[DataError, ...]
    images: int  # at most, per record
    regions: int
    masks: int


def survey(source: MecovqaSource, on_error: str) -> Survey:
    """Reads every record once. An unusable one is raised or, with `on_error` skip, listed."""
    usable, skipped, images, regions, masks = [], [], 0, 0, 0
    for index in range(len(source)):
        try:
            record = source[index]
            if record.turns[-1][0] != "gpt":
                raise record.error("question without an expected answer", "a gpt turn at the end", record.turns[-1][1])
        except DataError as error:
            if on_error == "raise":
                raise
            skipped.append(error)
            continue
        usable.append(index)
        images = max(images, len(record.images))
        regions = max(regions, sum(len(REGION.findall(text)) for _, text in record.turns))
        masks = max(masks, len(MASK.findall(record.turns[-1][1])))
    kind = "grounding" if masks else "region" if regions else "vqa"
    return Survey(kind, tuple(usable), tuple(skipped), images, regions, masks)


def annotation_files(path: str | os.PathLike) -> list[Path]:
    """The file itself, or a data folder's JSON files: those in its `test` folder, else its own. FileNotFoundError without any."""
    path = Path(path)
    if path.is_file():
        return [path]
    files = sorted((path / "test").glob("*.json")) or sorted(path.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"{path}: expected an annotation file or a folder with *.json or test/*.json, found none")
    return files


def data_root(file: Path) -> Path:
    """Where a file's paths start: its folder, or the one above when only that holds `images`, as in MeCoVQA's train and test folders."""
    folder = file.resolve().parent
    return folder.parent if (folder.parent / "images").is_dir() and not (folder / "images").is_dir() else folder


def task_names(files: Sequence[Path]) -> list[str]:
    """A name per file: its stem, with the data folder's name before it where stems repeat. ValueError when that is not enough."""
    stems = [file.stem for file in files]
    names = [stem if stems.count(stem) == 1 else f"{data_root(file).name}-{stem}" for stem, file in zip(stems, files, strict=True)]
    for name, file in zip(names, files, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"{file}: more than one file would be called {name!r}; evaluate them into different folders")
    return names


def evaluate(
    checkpoint_dir: str | os.PathLike,
    sources: Iterable[str | os.PathLike],
    out_dir: str | os.PathLike,
    *,
    batch_size: int | None = None,
    max_new_tokens: int | None = None,
    mask_threshold: float | None = None,
    limit: int | None = None,
    protocol: str = "exact",
) -> dict:
    """Evaluates the newest checkpoint in a workdir on annotation files or data folders; what is None comes from the experiment's `eval`.

    limit: records per file. protocol `reference` scores as the original does (see `metrics`) and asks with its evaluation template, v1,
    while `exact` asks with the template that the model was trained on. Raises DataError for a bad record unless the experiment says
    `on_error` skip. Returns what `metrics.json` holds:
        {"checkpoint", "protocol", "max_new_tokens", "mask_threshold", "tasks": {name: task}} with each task
        {"kind", "file", "records", "skipped", "predictions", "metrics": {name: value}, "router" (see `router.summarise`; MoE models only)}.
    """
    experiment, params, tokenizer_dir = load_params(str(checkpoint_dir))
    params = merge_lora(params, experiment.model.lora)
    experiment = dataclasses.replace(experiment, model=dataclasses.replace(experiment.model, lora=LoraConfig()))
    given = {"batch_size": batch_size, "max_new_tokens": max_new_tokens, "mask_threshold": mask_threshold}
    settings = dataclasses.replace(experiment.eval, **{name: value for name, value in given.items() if value is not None})
    if protocol == "reference":
        experiment = dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, template="v1"))
    files = [file for source in sources for file in annotation_files(source)]
    params, tokenizer, step_dir = jax.tree.map(jnp.asarray, params), Tokenizer.load(tokenizer_dir), Path(tokenizer_dir).parent
    setting = {
        "checkpoint": str(step_dir),
        "protocol": protocol,
        "max_new_tokens": settings.max_new_tokens,
        "mask_threshold": settings.mask_threshold,
    }
    result = setting | {"tasks": {}}
    for name, file in zip(task_names(files), files, strict=True):
        # the time tells a run that was started anew in the same folder from the one before
        header = {"task": name, "file": str(file.resolve()), "written": int(step_dir.stat().st_mtime)} | setting
        result["tasks"][name] = _evaluate_file(header, experiment, settings, params, tokenizer, Path(out_dir), limit)
    (Path(out_dir) / "metrics.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def _evaluate_file(
    header: dict, experiment: ExperimentConfig, settings: EvalConfig, params: Params, tokenizer: Tokenizer, out_dir: Path, limit: int | None
) -> dict:
    model, mask = experiment.model, experiment.model.mask
    source = MecovqaSource(header["file"], str(data_root(Path(header["file"]))))
    found = survey(source, experiment.data.on_error)
    indices = found.usable[:limit]
    if not indices:
        raise ValueError(f"{header['file']}: no usable record, {len(found.skipped)} skipped")
    # one slot more than any answer should use, so that a mask too many is drawn and counted
    drawn = found.masks + 1 if found.kind == "grounding" else 0
    generator = Generator(
        model, params, eos_id=tokenizer.eos_id, seg_id=tokenizer.seg_id, max_new_tokens=settings.max_new_tokens, max_masks=drawn
    )
    data = dataclasses.replace(experiment.data, max_images=max(found.images, 1), max_regions=found.regions, max_masks=found.masks)
    evaluator = EVALUATORS[found.kind](
        header["task"],
        Loader([source], tokenizer, data, model),
        tokenizer,
        indices,
        out_dir,
        header,
        batch_size=min(settings.batch_size, len(indices)),
        draw_masks=mask_drawer(mask.image_size, mask.unpad, data.mask_canvas, settings.mask_threshold) if drawn else None,
        protocol=header["protocol"],
        probe=router.RouterProbe(model, params, seg_id=tokenizer.seg_id) if model.moe_layers else None,
    )
    values = dict(evaluator.run(generator))
    rows = evaluator.rows()
    split = {"router": router.summarise([row["router"] for row in rows], model)} if model.moe_layers and rows else {}
    return {
        "kind": found.kind,
        "file": header["file"],
        "records": len(rows),
        "skipped": [error.as_dict() for error in (*found.skipped, *evaluator.skipped)],
        "predictions": evaluator.predictions.path.name,
        "metrics": values,
    } | split


def write_report(result: dict, out_dir: str | os.PathLike, per_task: int) -> Path:
    """The page of one evaluation: metrics by modality and `per_task` examples of each file. Returns its path."""
    tables = {name: by_modality(task["metrics"]) for name, task in result["tasks"].items()}
    routers = [task for task in result["tasks"].values() if "router" in task]
    settings = {name: value for name, value in result.items() if name != "tasks"}
    data = report.ReportData(
        title="Evaluation",
        facts=settings | {name: f"{task['records']} records, {len(task['skipped'])} skipped" for name, task in result["tasks"].items()},
        tables=tables,
        router=report_router(routers[0]) if routers else None,
        examples=report_examples(out_dir, per_task),
    )
    return report.write_report(data, out_dir)


def by_modality(metrics: dict[str, float]) -> dict[str, dict[str, float]]:
    """{"all" or modality: {metric: value}} from the flat names `metric` and `metric/modality`."""
    table: dict[str, dict[str, float]] = {}
    for name, value in metrics.items():
        metric, _, modality = name.partition("/")
        table.setdefault(modality or "all", {})[metric] = value
    return table


def report_router(task: dict) -> report.Router:
    """A task's router split as the report shows it."""
    split = task["router"]
    experts = [f"expert {i}" for i in range(len(next(iter(split["share"].values()))[0]))]
    return report.Router(split["layers"], list(split["share"]), experts, np.stack(list(split["share"].values()), axis=1))


def report_examples(out_dir: str | os.PathLike, per_task: int) -> list[report.Example]:
    """Questions and answers of an evaluated folder for the report's gallery, spread evenly over each task's records."""
    tasks = json.loads((Path(out_dir) / "metrics.json").read_text())["tasks"]
    return [example for task in tasks.values() for example in _task_examples(Path(out_dir), task, per_task)]


def _task_examples(out_dir: Path, task: dict, count: int) -> Iterator[report.Example]:
    source = MecovqaSource(task["file"], str(data_root(Path(task["file"]))))
    lines = (out_dir / task["predictions"]).read_text(encoding="utf-8").splitlines()[1:]
    rows = [row for row in map(json.loads, lines) if row["image"]]
    for row in rows[:: max(1, len(rows) // count)][:count]:
        record = source[row["record"]]
        path = record.path(record.images[-1])
        yield report.Example(
            image=path,
            task=task["kind"],
            modality=row["modality"],
            question=row["question"],
            answer=row["answer"],
            expected=row["expected"],
            scores={name: row["scores"][name] for name in GALLERY_SCORES if name in row["scores"]},
            true_masks=[decode_rle(rle) for rle in row.get("true_masks", ())],
            masks=[decode_rle(rle) for rle in row.get("masks", ())],
            region_masks=report.region_masks(record, load_image(path).shape[:2]),
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True, help="workdir of a training run")
    parser.add_argument("--data", required=True, nargs="+", help="annotation files in MeCoVQA form, or folders that hold them")
    parser.add_argument("--out", required=True, help="folder for predictions and metrics.json")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--mask-threshold", type=float, help="on the sigmoid; the original evaluates at 0.1")
    parser.add_argument("--limit", type=int, help="records per file")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="exact", help="reference: score and ask as the original program does")
    parser.add_argument("--gallery", type=int, default=24, help="examples per file in the report")
    arguments = vars(parser.parse_args())
    checkpoint, sources, out_dir, gallery = (arguments.pop(name) for name in ("checkpoint", "data", "out", "gallery"))
    result = evaluate(checkpoint, sources, out_dir, **arguments)
    for name, task in result["tasks"].items():
        print(f"\n{name}: {task['records']} records, {len(task['skipped'])} skipped")
        for metric, value in task["metrics"].items():
            if "/" not in metric:  # those by modality are in metrics.json
                print(f"  {metric:26} {value:8.4f}")
    print(f"\nReport: {write_report(result, out_dir, gallery)}")


if __name__ == "__main__":
    main()
