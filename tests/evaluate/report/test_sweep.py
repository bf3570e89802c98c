"""The report of a sweep: its figures are those of the rows, and the page shows all of them, safely."""

import base64
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

from medplib_jax.evaluate.evaluators.predictions import read_rows
from medplib_jax.evaluate.report import published as elsewhere
from medplib_jax.evaluate.report import sweep as report_sweep
from medplib_jax.evaluate.report import sweep_cases, sweep_tables
from medplib_jax.evaluate.report.comparisons import FIELDS, Figure, compare
from medplib_jax.evaluate.report.paths import shorten
from medplib_jax.evaluate.report.published import published
from medplib_jax.evaluate.report.sweep import write_sweep_report
from medplib_jax.evaluate.report.sweep_load import load_sweep
from medplib_jax.evaluate.report.sweep_tables import best_of, entry
from medplib_jax.evaluate.result import TaskEntry
from tests.evaluate.report.sweep_fixture import BASELINE, CHECKPOINTS, SKIPPED, write_sweep
from tests.evaluate.report.tags import Tags

TASK = "MeCoVQA_Grounding_test"
NASTY = "<script>alert('x')</script> & \"quoted\" <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep of four checkpoints with text that wants to break the page."""
    folder = tmp_path_factory.mktemp("sweep")
    sweep = write_sweep(folder, 8, [CHECKPOINTS[i] for i in (0, 1, 3, 4)])
    sweep["tasks"][0]["source"] = sweep["checkpoints"][2]["run"] = sweep["checkpoints"][3]["run"] = (
        NASTY  # a label of the curves, too
    )
    sweep["cells"][0]["skipped"] = [SKIPPED | {"what": NASTY, "task": NASTY}]
    (folder / "sweep.json").write_text(json.dumps(sweep))
    path = folder / "predictions/stage_IV-1600/exact/MeCoVQA_Grounding_test.0.jsonl"
    path.write_text(
        re.sub(r'"answer": "[^"]*"', f'"answer": {json.dumps(NASTY)}'.replace("\\", r"\\"), path.read_text())
    )
    write_sweep_report(folder)
    return folder


@pytest.fixture(scope="module")
def page(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.fixture
def small(folder, tmp_path):
    """A copy with two checkpoints on one task, quickly reported; returns its folder and a function that changes its
    sweep.json.
    """
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)

    def change(edit=lambda sweep: None):
        sweep = json.loads((folder / "sweep.json").read_text())
        sweep["cells"] = [
            cell
            for cell in sweep["cells"]
            if cell["task"] == TASK and cell["protocol"] == "exact" and cell["checkpoint"] != "stage_III-600"
        ]
        edit(sweep)
        (copy / "sweep.json").write_text(json.dumps(sweep))
        return copy

    return change


def by_key(report):
    return {(f["checkpoint"], f["task"], f["protocol"], f["metric"], f["modality"]): f for f in report["figures"]}


def test_figures_are_the_metrics_that_evaluation_yields(folder, report):
    found, expected = by_key(report), {}
    assert found
    for cell in json.loads((folder / "sweep.json").read_text())["cells"]:
        for name, value in cell["metrics"].items():
            metric, _, modality = name.partition("/")
            expected[cell["checkpoint"], cell["task"], cell["protocol"], metric, modality or "all"] = value
    assert {key: figure["value"] for key, figure in found.items()} == pytest.approx(expected)
    assert report["notes"] == [] and all(list(figure) == list(FIELDS) for figure in report["figures"])


def test_intervals_and_differences(report):
    found = by_key(report)
    tested = [figure for figure in report["figures"] if figure["p"] is not None]
    assert tested and all(
        figure["modality"] != "modality_mean" and figure["q"] >= figure["p"] - 1e-12 for figure in tested
    )
    compared = [figure for figure in report["figures"] if figure["delta"] is not None and figure["modality"] == "all"]
    assert {figure["p"] is not None for figure in compared} == {True}  # of every metric, not of the main ones alone
    for key, figure in found.items():
        if (
            figure["low"] is not None and figure["records"] > 10 and "bleu" not in key[3] and key[3] != "mBMR"
        ):  # of a small corpus it is biased
            assert figure["low"] <= figure["value"] <= figure["high"]
        if figure["checkpoint"] == BASELINE:
            assert figure["baseline"] is figure["delta"] is figure["p"] is None
        elif figure["delta"] is not None and figure["checkpoint"] != "stage_III-600":  # which lacks a record
            assert figure["delta"] == pytest.approx(figure["value"] - found[BASELINE, *key[1:]]["value"])
            assert figure["delta_low"] is None or figure["delta_low"] <= figure["delta"] + 0.05
    best = found["stage_IV-1600", "MedGRIT_VG", "exact", "recall_at_0.5", "all"]
    worst = found["stage_III-600", "MedGRIT_VG", "exact", "recall_at_0.5", "all"]
    assert (
        best["delta_low"] > 0 and best["p"] < 0.1 and worst["delta_high"] < 0
    )  # eight images cannot give a smaller p than 2 / 256


def test_marks_of_significant_differences():
    def made(metric, delta, q):
        return entry(
            Figure(
                "a",
                "",
                1,
                "t",
                "grounding",
                "exact",
                metric,
                True,
                "all",
                0.5,
                0.4,
                0.6,
                10,
                10,
                None,
                "b",
                delta,
                delta - 0.1,
                delta + 0.1,
                9,
                q,
                q,
            ),
            best=False,
        )

    better, worse, unsure = made("mDice", 0.2, 0.01), made("mDice", -0.2, 0.01), made("mDice", 0.2, 0.06)
    assert [(one.delta, one.mark) for one in (better, worse, unsure)] == [
        ("+20.0*", "up"),
        ("-20.0*", "down"),
        ("+20.0", ""),
    ]
    assert made("false_mask_rate", 0.2, 0.01).mark == "down"  # less is better
    assert (better.value, better.interval) == ("50.0", "40.0–60.0")
    assert (
        better.hint == "10 records, 10 pictures, patients not known; +20.00 to b on 9 common records; "
        "95 % interval of the difference +10.00 to +30.00; p 0.0100, q 0.0100"
    )


def test_differences_are_on_common_records(folder, report):
    sweep = load_sweep(folder)
    task, protocol = TASK, "exact"
    cells = {cell.checkpoint: cell for cell in sweep.column(task, protocol)}
    short, base = cells["stage_III-600"], cells[BASELINE]
    assert len(short.records) == len(base.records) - 1
    common = np.isin(base.records, short.records)
    figure = by_key(report)["stage_III-600", task, protocol, "gIoU", "all"]
    assert figure["paired"] == common.sum()
    assert figure["delta"] == pytest.approx(short.statistics["gIoU"].value() - base.statistics["gIoU"][common].value())


def test_the_same_answers_give_the_same_figures(folder, small):
    first = write_sweep_report(small()).read_text(encoding="utf-8")
    assert write_sweep_report(small()).read_text(encoding="utf-8") == first

    def drop(sweep):
        sweep["cells"] = [cell for cell in sweep["cells"] if cell["checkpoint"] != "stage_IV-800"]

    def figures(sweep, checkpoint):
        found = [
            figure
            for figure in compare(sweep)
            if (figure.checkpoint, figure.task, figure.protocol) == (checkpoint, TASK, "exact")
        ]
        return [(figure.value, figure.low, figure.high, figure.delta, figure.delta_low, figure.p) for figure in found]

    expected = figures(load_sweep(small()), "stage_IV-1600")
    assert (
        len(expected) > 50 and figures(load_sweep(small(drop)), "stage_IV-1600") == expected
    )  # whatever stands beside it


def read_script(path):
    """(what, task's number, record, content) that a file of the page hands over."""
    what, number, record, content = re.fullmatch(
        r"loaded\((.*?),(.*?),(.*?),(.*)\);\n", path.read_text(), re.S
    ).groups()
    return json.loads(what), json.loads(number), json.loads(record), json.loads(content)


def test_every_case_is_in_the_index_and_no_network_is_needed(folder, page):
    number = dict(re.findall(r'data-number="(\d+)" data-task="([^"]+)"', page))
    number = {task: number for number, task in number.items()}[TASK]
    what, _, _, index = read_script(folder / sweep_cases.FOLDER / f"{number}.js")
    rows = read_rows(*folder.glob(f"predictions/stage_IV-1600/exact/{TASK}.*.jsonl"))
    assert what == "index" and index["shown"][:2] == ["stage_IV-1600", BASELINE]
    assert [line[0] for line in index["records"]] == [row["record"] for row in rows]
    percents = {line[0]: line[5] for line in index["records"]}
    assert percents == {
        row["record"]: round(100 * row["scores"]["dice"]) if row["scores"]["target"] else None for row in rows
    }
    flagged = {line[0]: line[3] for line in index["records"]}
    assert all((flags == ["false mask"]) == (not row["scores"]["target"] and row["scores"]["drawn"]) for row, flags in
               zip(rows, flagged.values(), strict=True))  # fmt: off
    bare = re.sub(r'url\(#[^)]*\)|xlink:href="#\w+"|http://www.w3.org/\S*', "", page)
    assert not re.search(r'(src|href)="(https?:)?//|@import|<link|url\(', bare)


def test_a_case_holds_picture_outlines_and_answers(folder, page):
    files = {path.stem: read_script(path) for path in (folder / sweep_cases.FOLDER).glob("*-*.js")}
    assert len(files) > 40 and all(what == "case" for what, *_ in files.values())
    case = next(case for _, _, _, case in files.values() if case["truth"])
    header, data = case["picture"].split(",", 1)
    with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
        assert header == "data:image/webp;base64" and list(picture.size) == case["size"] and max(picture.size) <= 512
    assert all(path.startswith("M") and path.endswith("z") for path in case["truth"])
    assert len(case["answers"]) == 4 and {"text", "scores", "shapes", "area"} == case["answers"][BASELINE].keys()


def test_untrusted_text_is_escaped_everywhere(page):
    found = Tags(page).found
    assert [tag for tag, _ in found].count("script") == 1 and not [
        name for _, attributes in found for name in attributes if name.startswith("on")
    ]
    assert page.count("alert(&#39;x&#39;)") >= 3 and "<script>alert" not in page


def test_every_table_of_figures_names_its_protocols(page):
    for table in re.findall(
        r'<table class="sortable">(.*?)</table>', page[: page.index('id="elsewhere"')], flags=re.DOTALL
    ):
        heads = re.findall(
            r"<th scope=\"col\" class=\"p-(\w+).*?</th>", table[: table.index("</thead>")], flags=re.DOTALL
        )
        assert set(heads) == {"exact", "reference"}
        assert [tag for tag in re.findall(r'class="tag p-(\w+)"', table)] == heads
    assert "masks where the sigmoid exceeds 0.5" in page and "masks where the sigmoid exceeds 0.1" in page


def test_page_shows_runs_router_skipped_and_published(page):
    # a curve for each task, a map for each checkpoint with a router, a filter for each task's cases
    assert page.count("<svg") == 6 + 2 + 6
    assert "currentColor" in page and "expert 1" in page
    for shown in (
        "images/ct_9.png",
        "MeCoVQA grounding: not compared with MeCoVQA_Grounding_test: the published test set has 2,344 records",
        "Drawings made by a program, not images of patients. All tasks.",
        "The SHA-256 of no published test set is known",
        "MedPLIB, re-run 1: an independent group",
        "79.90",
        "arXiv 2609.37283",
        "baseline",
    ):
        assert shown in page, shown


def test_markdown_is_aligned_and_narrow(folder):
    text = (folder / "report.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    assert len(tables) > 20
    for table in tables:
        assert len({len(line) for line in table.splitlines()}) == 1
    assert max(map(len, text.splitlines())) <= 120
    assert f"{BASELINE} (baseline)" in text and "images/ct_9.png" not in text
    assert "(elsewhere)" not in text and "Drawings made by a program" in text
    assert "| records/pictures/patients" in text


def test_rows_that_disagree_with_the_sweep_are_named(small):
    def edit(sweep):
        sweep["cells"][0]["metrics"]["mDice"] += 0.01
        sweep["cells"][1]["records"] += 1

    path = small(edit)
    assert [note.partition(":")[0] for cell in load_sweep(path).cells for note in cell.notes] == [
        f"{checkpoint} on {TASK} (exact)" for checkpoint in (BASELINE, "stage_IV-800")
    ]
    text = write_sweep_report(path).read_text()
    assert "mDice of the rows is" in text and "rows on disk, sweep.json counts" in text


def test_broken_input_is_named(small, tmp_path):
    empty = {"checkpoints": [], "tasks": [], "cells": []}
    stray = {"checkpoint": "gone", "task": "rad", "protocol": "exact", "predictions": [], "records": 0, "metrics": {}}
    for broken, message in (
        ({"cells": []}, "checkpoints, tasks not found"),
        (empty | {"baseline": "x"}, "baseline 'x'"),
        (empty | {"cells": [stray]}, "'gone' on 'rad'"),
        (empty | {"cells": [{"task": "rad"}]}, "sweep.json: CellEntry.* missing .*'protocol'"),
    ):
        (tmp_path / "sweep.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=message):
            load_sweep(tmp_path)
    path = small()
    (path / f"predictions/{BASELINE}/exact/{TASK}.1.jsonl").open("a").write("{half a li")
    with pytest.raises(ValueError, match=rf"{TASK}\.1\.jsonl, line \d+: not JSON"):
        load_sweep(path)


def test_an_empty_sweep_has_a_page(tmp_path):
    task = {"name": "rad", "kind": "vqa", "file": "rad.json", "records": 3}
    (tmp_path / "sweep.json").write_text(
        json.dumps({"baseline": None, "checkpoints": [], "tasks": [task], "cells": []})
    )
    text = write_sweep_report(tmp_path).read_text()
    assert "Nothing has been evaluated yet" in text and "Not evaluated yet" in text


def test_one_answer_without_baseline_or_steps(tmp_path):
    row = {
        "record": 0,
        "image": [],
        "modality": "",
        "question": "?",
        "answer": "yes",
        "expected": "yes",
        "answer_type": "",
        "scores": {"closed_accuracy": 1.0},
    }
    (tmp_path / "a.jsonl").write_text(
        '{"header": 1}\n' + json.dumps(row) + '\n{"record": 1, "skipped": {"what": "x"}}\n'
    )
    cell = {
        "checkpoint": "a",
        "task": "rad",
        "protocol": "exact",
        "predictions": ["a.jsonl"],
        "records": 1,
        "skipped": [],
        "metrics": {"accuracy": 1.0},
    }
    task = {"name": "rad", "kind": "vqa", "file": "rad.json", "records": 2}
    (tmp_path / "sweep.json").write_text(
        json.dumps({"baseline": None, "checkpoints": [{"name": "a"}], "tasks": [task], "cells": [cell]})
    )
    assert "100.0" in write_sweep_report(tmp_path).read_text()
    figures = json.loads((tmp_path / "report.json").read_text())["figures"]
    assert {figure["modality"] for figure in figures} == {"all", "none", "modality_mean"}


def test_cases_with_pictures_are_the_worst_the_flagged_and_those_that_changed():
    scores = {record: record / 40 for record in range(40)}
    before = scores | {25: 1.0, 30: 0.0}
    chosen = sweep_cases.choose([scores, before], {33: ("false mask",)}, 10)
    assert len(chosen) == 10 and {0, 33, 25, 30, 39} <= chosen
    assert sweep_cases.choose([scores, before], {}, 100) == set(range(40))
    assert sweep_cases.choose([{0: None, 1: 0.5}], {}, 5) == {0, 1}


def test_a_picture_that_is_gone_is_named(small, tmp_path):
    def edit(sweep):
        sweep["tasks"] = [task | {"root": str(tmp_path / "nowhere")} for task in sweep["tasks"]]

    path = small(edit)
    write_sweep_report(path)
    case = read_script(next((path / sweep_cases.FOLDER).glob("*-*.js")))[3]
    assert case["problem"].startswith("file is missing: images/") and case["picture"]


def test_published_figures_bear_the_names_of_tasks():
    def found(name, kind, part=""):
        task = TaskEntry(name, kind, "x.json", 10, part=part)
        return {(figure.task, figure.label) for figure in published() if figure.bears_name_of(task)}

    assert len(published()) == 30
    grounding = found("MeCoVQA_Grounding_test", "grounding")
    assert {task for task, _ in grounding} == {"MeCoVQA grounding"} and len(grounding) == 3
    assert {task for task, _ in found("zeroshot4grounding-mr", "grounding")} == {"zero-shot MR"}
    assert {task for task, _ in found("xray", "grounding")} == {"zero-shot X-ray"}
    assert found("medgrit", "refer_box", "ROC") == {("Med-GRIT ROC", "BiRD")}
    assert found("medgrit", "refer_box", "VG") == {("Med-GRIT VG", "BiRD")}
    assert {task for task, _ in found("VQA_RAD-test", "vqa")} == {"VQA-RAD"}
    assert not found("my_mri", "grounding") and not found("mr", "vqa")
    assert all(0 < value < 1 for figure in elsewhere.published() for value in figure.values.values())


def test_published_figures_stand_beside_the_published_data_alone(small, monkeypatch):
    known = [dataclasses.replace(one, content=frozenset(["cafe"])) for one in published()]
    for module in (elsewhere, sweep_tables, report_sweep):
        monkeypatch.setattr(module, "published", lambda: known)

    def edit(content):
        return lambda sweep: [task.update(content=content) for task in sweep["tasks"] if task["name"] == TASK]

    path = small(edit("beef"))
    write_sweep_report(path)
    text = (path / "report.md").read_text()
    assert "(elsewhere)" not in text and "not compared with MeCoVQA_Grounding_test" in text
    path = small(edit("cafe"))
    write_sweep_report(path)
    text = (path / "report.md").read_text()
    assert "(elsewhere) MedPLIB, paper" in text and "not compared" not in text


def test_best_is_said_only_where_it_means_something():
    def best(metric, values, drawing=("a", "b", "c")):
        figures = [
            Figure(name, name, None, "t", "grounding", "exact", metric, True, "all", value, None, None, 9, 9, None)
            for name, value in values.items()
        ]
        return best_of(figures, {(name, "exact") for name in drawing})

    assert best("mDice", {"a": 0.5, "b": 0.7}) == "b" and best("false_mask_rate", {"a": 0.5, "b": 0.7}) == "a"
    assert best("mDice", {"a": 0.5}) is best("mDice", {"a": 0.7, "b": 0.7}) is best("mDice", {"a": 0, "b": 0}) is None
    assert best("no_target_accuracy", {"a": 0.6, "b": 1.0, "c": 0.7}, drawing=("a", "c")) == "c"
    assert best("false_mask_rate", {"a": 0.4, "b": 0.0}, drawing=("a",)) is None


def test_patients_are_resampled_where_they_are_known(small):
    """Of a single patient there is no interval; of few patients it is wider than of their images."""

    def figures(path):
        write_sweep_report(path)
        return by_key(json.loads((path / "report.json").read_text()))[BASELINE, TASK, "exact", "gIoU", "all"]

    def tell(path, patients):
        for file in path.glob(f"predictions/*/exact/{TASK}.*.jsonl"):
            header, *rows = map(json.loads, file.read_text().splitlines())
            ordered = [row | {"patient": f"p{zlib.crc32(row['image'][0].encode()) % patients}"} for row in rows]
            file.write_text("".join(json.dumps(line) + "\n" for line in (header, *ordered)))

    path = small()
    images = figures(path)
    tell(path, 3)
    few = figures(path)
    tell(path, 1)
    one = figures(path)
    assert images["patients"] is None and (few["patients"], one["patients"]) == (3, 1)
    assert few["value"] == pytest.approx(images["value"]) == one["value"] and images["images"] == few["images"] > 3
    assert one["low"] is one["high"] is None is not images["low"]
    assert few["low"] != images["low"]


def test_a_report_says_how_it_was_made_and_not_whose_it_is(folder, page, report):
    facts = {(fact["what"], fact["which"]): fact["value"] for fact in report["reproduction"]}
    assert "2,000 bootstrap resamples" in facts["statistics", ""] and "SHA-256" in facts["data", TASK]
    assert facts["weights", BASELINE] == "not known" and 'id="reproduction"' in page
    texts = [(folder / name).read_text() for name in ("report.html", "report.md", "report.json", "report.csv")]
    assert not [text for text in texts if str(folder) in text]
    assert shorten("see /home/me/runs/a/data/test/x.json, https://a.b/c/d/e/f and ../b/c/d/e") == (
        "see …/data/test/x.json, https://a.b/c/d/e/f and ../b/c/d/e"
    )


def test_charts_stand_beside_the_page_as_pdf_and_svg(folder):
    names = {path.name for path in (folder / report_sweep.FIGURES).iterdir()}
    assert {f"{TASK}-steps.pdf", f"{TASK}-steps.svg", "router-stage_IV-1600-0.pdf"} <= names
    assert (folder / report_sweep.FIGURES / f"{TASK}-steps.pdf").read_bytes().startswith(b"%PDF")


def test_figures_by_structure_where_records_name_it(small):
    path = small()
    for file in path.glob(f"predictions/*/exact/{TASK}.*.jsonl"):
        header, *rows = map(json.loads, file.read_text().splitlines())
        named = [row | {"structure": ("liver", "spleen", "")[row["record"] % 3]} for row in rows]
        file.write_text("".join(json.dumps(line) + "\n" for line in (header, *named)))
    page = write_sweep_report(path).read_text()
    found = by_key(json.loads((path / "report.json").read_text()))
    lines = [row for file in path.glob(f"predictions/{BASELINE}/exact/{TASK}.*.jsonl") for row in read_rows(file)]
    wanted = [row["scores"]["dice"] for row in lines if row["structure"] == "liver" and row["scores"]["target"]]
    figure = found[BASELINE, TASK, "exact", "mDice", "structure: liver"]
    assert figure["value"] == pytest.approx(np.mean(wanted)) and figure["records"] == len(wanted)
    mean = found[BASELINE, TASK, "exact", "mDice", "modality_mean"]
    assert mean["records"] == len({row["modality"] for row in lines if row["scores"]["target"]})  # not structures
    assert "By structure: mDice" in page and ">spleen<" in page
    assert not [key for key in found if key[3] == "hit_rate" and key[4].startswith("structure")]


def test_needs_no_jax():
    code = "import sys, medplib_jax.evaluate.report.sweep; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
