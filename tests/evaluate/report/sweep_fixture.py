"""A sweep as evaluation leaves it, without a model: answers of pretended checkpoints that get better with their step,
on generated images.

To look at its report: python -m tests.evaluate.report.sweep_fixture FOLDER
"""

import json
import sys
from pathlib import Path

import numpy as np

from medplib_jax.data import images
from medplib_jax.data.records import MASK
from medplib_jax.data.rle import encode_rle
from medplib_jax.data.sources import MecovqaSource
from medplib_jax.datasets.phantom import generate as phantom
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.report.sweep import write_sweep_report

# name, run, step, how good it is (0 to 1)
CHECKPOINTS = (
    ("stage_III-600", "stage_III", 600, 0.55),
    ("stage_III-1200", "stage_III", 1200, 0.72),
    ("stage_IV-400", "stage_IV", 400, 0.70),
    ("stage_IV-800", "stage_IV", 800, 0.80),
    ("stage_IV-1600", "stage_IV", 1600, 0.88),
    ("medplib-7b-2e", "medplib-7b-2e", None, 0.74),
)
BASELINE = "stage_III-1200"
SKIPPED = {
    "file": "test/MeCoVQA_Grounding_test.json",
    "record": 3,
    "what": "file is missing",
    "expected": "images/ct_9.png",
    "found": "no such file",
}
SPACING = (0.8, 0.5)  # of every other picture of the questions with masks
WORDS = "left right upper lower lung liver kidney mass cyst normal".split()


def write_sweep(workdir, test_examples=16, checkpoints=CHECKPOINTS, protocols=metrics.PROTOCOLS, seed=0):
    """Writes `workdir`/phantom, `workdir`/predictions and `workdir`/sweep.json; returns the latter's content."""
    workdir = Path(workdir)
    data = workdir / "phantom"
    phantom.generate(data, 1, test_examples, seed, processes=1)
    tasks = [(Path(name).stem, kind, "", data / name) for kind, name in phantom.FILES["test"].items()]
    tasks = [(name, {"complex": "vqa"}.get(kind, kind), part, file) for name, kind, part, file in tasks]
    tasks += [(f"MedGRIT_{part}", "refer_box", part, tasks[0][3]) for part in ("VG", "ROC", "MIA")]
    entries, cells = [], []
    for name, kind, part, file in tasks:
        source = MecovqaSource(str(file), str(data))
        records = [source[i] for i in range(len(source))]
        entries.append(
            {
                "name": name,
                "kind": kind,
                "part": part,
                "file": str(file),
                "root": str(data),
                "records": len(records),
                "source": "generated",
                "generated": True,
            }
        )
        for checkpoint, _, _, skill in checkpoints:
            for protocol in protocols:
                rng = np.random.default_rng([seed, *f"{name}{checkpoint}".encode()])
                rows = [_row(record, kind, part, skill, protocol, rng) for record in records]
                skipped = [SKIPPED] if kind == "grounding" and skill < 0.6 else []
                if skipped:
                    del rows[3]
                cells.append(_write_cell(workdir, checkpoint, name, protocol, rows, skipped, rng))
    known = [
        {"name": name, "path": f"runs/{run}", "run": run, "step": step, "kind": "jax" if step else "torch"}
        for name, run, step, _ in checkpoints
    ]
    sweep = {
        "baseline": BASELINE if BASELINE in [entry["name"] for entry in known] else None,
        "checkpoints": known,
        "tasks": entries,
        "cells": cells,
    }
    (workdir / "sweep.json").write_text(json.dumps(sweep))
    return sweep


def _write_cell(workdir, checkpoint, task, protocol, rows, skipped, rng):
    names = []
    for shard in range(2):
        names.append(f"predictions/{checkpoint}/{protocol}/{task}.{shard}.jsonl")
        path = workdir / names[-1]
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [{"task": task, "protocol": protocol}, *rows[shard::2]]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = metrics.by_modality(metrics.statistics(rows, protocol), [row["modality"] for row in rows])
    return {
        "checkpoint": checkpoint,
        "task": task,
        "protocol": protocol,
        "max_new_tokens": 64,
        "cut_off": 0,
        "mask_threshold": 0.5 if protocol == "exact" else 0.1,
        "predictions": names,
        "records": len(rows),
        "skipped": skipped,
        "metrics": values,
        "router": router(sorted({row["modality"] for row in rows}), rng) if checkpoint.startswith("stage_IV") else None,
    }


def router(modalities, rng, layers=6, experts=2):
    def split(kinds):
        shares = {
            kind: rng.dirichlet([2.0 + 3 * (kind == "SEG"), *[2.0] * (experts - 1)], layers).tolist() for kind in kinds
        }
        return {"share": shares, "tokens": {kind: int(rng.integers(50, 5000)) for kind in kinds}}

    kinds = ("text", "image", "region", "SEG")
    return {
        "layers": list(range(layers)),
        **split(kinds),
        "modalities": {modality: split(kinds) for modality in modalities},
    }


def _row(record, kind, part, skill, protocol, rng):
    row = {
        "record": record.index,
        "cut_off": False,
        "image": list(record.images),
        "modality": record.modality,
        "question": record.turns[-2][1],
        "answer_type": record.answer_type,
    }
    expected = MASK.sub("", record.turns[-1][1]).strip()
    if kind == "grounding":
        true = [
            images.load_mask(record.path(reference), _size(record)) > 0
            for reference in MASK.findall(record.turns[-1][1])
        ]
        drawn = [jitter(mask, skill, rng) for mask in true if rng.random() < 0.7 + 0.3 * skill]
        drawn = drawn if true or rng.random() < skill else [np.roll(_blob(_size(record)), rng.integers(-20, 20), 1)]
        answer = expected if len(drawn) == len(true) else "It is <SEG>." if drawn else "No, it is not visible."
        known = {"spacing": SPACING, "size": _size(record)} if record.index % 2 else {}
        scores = metrics.mask_scores(drawn, true, protocol, known.get("spacing"))
        row |= known
        row |= {
            "masks": [encode_rle(mask) for mask in drawn],
            "true_masks": [encode_rle(mask) for mask in true],
            "predicted_iou": [skill] * len(drawn),
        }
    elif part == "VG":
        true = np.sort(rng.integers(0, 999, (2, 2, 2)), axis=1).reshape(2, 4).astype(float)
        drawn = true + rng.normal(0, 180 * (1 - skill), true.shape)
        answer, scores = (
            " ".join("<box>({:.0f},{:.0f}),({:.0f},{:.0f})</box>".format(*box) for box in drawn),
            metrics.recall_at_iou(drawn, true),
        )
        row |= {"boxes": drawn.tolist(), "true_boxes": true.tolist()}
    else:
        words = expected.split()
        answer = expected if rng.random() < skill else " ".join([*words[:-1], WORDS[rng.integers(len(WORDS))]])
        if part == "ROC":
            scores = {"roc_accuracy": metrics.roc_hit(answer, expected)}
        elif part == "MIA":
            scores = metrics.mia_scores(answer, expected)
        elif expected.lower() in ("yes", "no") or record.answer_type == "closed":
            scores = {"closed_accuracy": metrics.closed_hit(answer, expected, protocol)}
        else:
            scores = {f"open_{name}": value for name, value in metrics.open_scores(answer, expected, protocol).items()}
    return row | {"answer": answer, "expected": expected, "scores": scores}


def _size(record):
    return images.load_image(record.path(record.images[0])).shape[:2]


def _blob(size):
    y, x = np.mgrid[: size[0], : size[1]]
    return (y - size[0] / 2) ** 2 + (x - size[1] / 2) ** 2 < (min(size) / 6) ** 2


def jitter(mask, skill, rng):
    """The mask moved, the further the lower the skill, and with noise at its border."""
    spread = (1 - skill) * 0.12 * max(mask.shape)
    moved = np.roll(mask, np.round(rng.normal(0, spread, 2)).astype(int), (0, 1))
    return (
        moved | np.roll(moved, rng.integers(-2, 3), 0)
        if rng.random() < 0.5
        else moved & np.roll(moved, rng.integers(-3, 4), 1)
    )


if __name__ == "__main__":
    write_sweep(sys.argv[1], test_examples=int(sys.argv[2]) if len(sys.argv) > 2 else 48)
    print(write_sweep_report(sys.argv[1]))
