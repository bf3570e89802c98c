"""20 checkpoints on 20 tasks of 2,000 records: the page is small and opens at once. Minutes."""

import json
import shutil
import time

import numpy as np
import orjson
import pytest
from PIL import Image
from scipy import ndimage

from medplib_jax.data.rle import encode_rle
from medplib_jax.evaluate import metrics
from medplib_jax.evaluate.own import load_metrics
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.rescore import rescore
from tests.evaluate.test_rescore import MY_METRICS

pytestmark = pytest.mark.slow
CHECKPOINTS, TASKS, RECORDS, PICTURES, SIDE = 20, 20, 2_000, 50, 512
MODALITIES = ("ct", "mr", "pet", "fundus", "x_ray", "ultrasound", "endoscopy", "dermoscopy")


def write_large(folder, checkpoints=CHECKPOINTS, tasks=TASKS, records=RECORDS):
    """Half of the tasks are about masks, half about words; lines of pretended checkpoints."""
    rng = np.random.default_rng(0)
    (folder / "data/images").mkdir(parents=True)
    for number in range(PICTURES):
        smooth = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 8)
        grey = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
        Image.fromarray(grey).save(folder / f"data/images/{MODALITIES[number % 8]}_{number}.png")
    masks = [_organ(rng) for _ in range(20)]
    lines = [encode_rle(mask) for mask in masks]
    scores = {
        (a, b): metrics.mask_scores([masks[a]], [masks[b]]) | {"masks": 1} for a in range(20) for b in range(0, 20, 4)
    }
    names, cells = [f"run-{number:02d}" for number in range(checkpoints)], []
    entries = [
        {"name": f"task-{number:02d}", "kind": ("grounding", "vqa")[number % 2], "file": f"t{number}.json"}
        | {"records": records, "root": str(folder / "data"), "content": f"{number}"}
        for number in range(tasks)
    ]
    for entry in entries:
        for skill, name in enumerate(names):
            rows = [_row(entry["kind"], record, skill / len(names), rng, lines, scores) for record in range(records)]
            path = folder / f"predictions/{name}/exact/{entry['name']}.00000.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"\n".join(map(orjson.dumps, [{"header": 1}, *rows])) + b"\n")
            cell = {"checkpoint": name, "task": entry["name"], "protocol": "exact", "records": records, "metrics": {}}
            cells.append(cell | {"predictions": [str(path.relative_to(folder))]})
    known = [{"name": name, "run": name, "step": None} for name in names]
    sweep = {"baseline": names[0], "checkpoints": known, "tasks": entries, "cells": cells}
    (folder / "sweep.json").write_text(json.dumps(sweep))


def _organ(rng):
    """One smooth shape, bool [SIDE, SIDE]."""
    smooth = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), 24)
    parts, _ = ndimage.label(smooth > np.quantile(smooth, 0.85))
    return parts == 1 + np.argmax(np.bincount(parts.ravel())[1:])


def _row(kind, record, skill, rng, lines, scores):
    number = record % PICTURES
    row = {"record": record, "image": [f"images/{MODALITIES[number % 8]}_{number}.png"]}
    row |= {"modality": MODALITIES[number % 8], "question": f"<image>\nQuestion {record}?", "answer_type": "open"}
    if kind == "grounding":
        true = 4 * (record % 5)
        drawn = true if rng.random() < skill else int(rng.integers(20))
        found = {"masks": [lines[drawn]], "true_masks": [lines[true]], "scores": scores[drawn, true]}
        return row | {"answer": "It is <SEG>.", "expected": "It is <SEG>."} | found
    right = float(rng.random() < skill)
    answer, expected = ("Yes" if right else "No"), "Yes"
    return row | {"answer": answer, "expected": expected, "scores": {"closed_accuracy": right}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    write_large(folder)
    yield folder
    shutil.rmtree(folder)  # hundreds of megabytes


def test_the_page_of_a_large_sweep_is_small_and_opens_at_once(folder, browser):
    began = time.perf_counter()
    page = write_sweep_report(folder)
    seconds = time.perf_counter() - began
    files = [page, *(folder / "report_cases").iterdir()]
    size = sum(path.stat().st_size for path in files) / 1e6
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(page.as_uri(), wait_until="load")
    tab.wait_for_timeout(500)
    paint = tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1e3
    print(f"report {seconds:.0f} s, first paint {paint:.2f} s, {size:.1f} MB in {len(files)} files")
    assert size < 20 and paint < 2


def test_ten_thousand_lines_are_rescored_in_less_than_a_minute(tmp_path):
    write_large(tmp_path, checkpoints=1, tasks=5)
    (tmp_path / "mine.py").write_text(MY_METRICS)
    began = time.perf_counter()
    rescore(tmp_path, load_metrics(str(tmp_path / "mine.py")))
    seconds = time.perf_counter() - began
    print(f"10,000 lines rescored in {seconds:.1f} s")
    assert seconds < 60
