"""Tables for a paper: their figures are the report's, whatever the format."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from medplib_jax.evaluate import table
from medplib_jax.evaluate.report.sweep import write_sweep_report
from tests.evaluate.report.sweep_fixture import CHECKPOINTS, write_sweep

EVERYTHING = {"tasks": "*", "metrics": "", "checkpoints": "*", "protocol": "", "modality": "all"}
GROUNDING = {"tasks": "MeCoVQA_Grounding*", "metrics": "mDice,mIoU"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, 8, CHECKPOINTS[1:4:2], protocols=("exact",))
    write_sweep_report(folder)
    return folder


@pytest.fixture(scope="module")
def figures(folder):
    return json.loads((folder / "report.json").read_text())["figures"]


def make(folder, kind, **selection):
    return table.make_table(folder, kind, **EVERYTHING | selection)


def test_csv_reads_back_to_the_reports_figures(folder, figures):
    rows = list(csv.DictReader(io.StringIO(make(folder, "csv", metrics="*"))))
    expected = [figure for figure in figures if figure["modality"] == "all"]
    assert rows and len(rows) == len(expected)
    for row, figure in zip(rows, expected, strict=True):
        assert {name: "" if value is None else str(value) for name, value in figure.items()} == row


def test_latex_and_markdown_show_the_same_figures(folder, figures):
    latex, markdown = (make(folder, kind, **GROUNDING) for kind in ("latex", "markdown"))
    shown = {
        figure["checkpoint"]: f"{100 * figure['value']:.1f}"
        for figure in figures
        if (figure["metric"], figure["task"], figure["modality"]) == ("mDice", "MeCoVQA_Grounding_test", "all")
    }
    assert len(shown) == 2
    for name, value in shown.items():
        (line,) = (line for line in latex.splitlines() if line.startswith(table.escape(name)))
        (row,) = (row for row in markdown.splitlines() if row.startswith(f"| {name} "))
        assert value in line.split("&")[1] and value in row.split("|")[2]
    assert r"\multicolumn{2}{c}{MeCoVQA\_Grounding\_test}" in latex and r"\cmidrule(lr){2-3}" in latex
    assert latex.count(r"\textbf{") == markdown.count("**") / 2 == 2
    counts = r"MeCoVQA_Grounding_test: \d+ records, \d+ pictures, patients not known\. Drawings made by a program"
    assert re.search(counts, latex) and re.search(counts, markdown)


def test_latex_is_balanced_and_escaped(folder):
    latex = make(folder, "latex", metrics="*")
    assert latex.count(r"\begin{tabular}") == latex.count(r"\end{tabular}") > 2  # of twelve columns at most
    body = latex[: latex.index(r"\end{tabular}")]
    plain = re.sub(r"\\[{}]", "", body)
    assert plain.count("{") == plain.count("}")
    assert not re.search(r"(?<!\\)[_%#$]", body)
    rows = [line for line in body.splitlines() if line.endswith(r"\\")][1:]  # the first one has joined columns
    assert len({len(re.findall(r"(?<!\\)&", row)) for row in rows}) == 1 and len(rows) == 3
    assert (
        table.escape(r"a\b~c^d<e>f")
        == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d\textless{}e\textgreater{}f"
    )


def test_report_csv_is_every_figure(folder, figures):
    rows = list(csv.DictReader(io.StringIO((folder / "report.csv").read_text())))
    assert len(rows) == len(figures) and [float(row["value"]) for row in rows] == [one["value"] for one in figures]


def test_seeds_are_a_row_with_mean_and_deviation(folder, figures):
    text = make(folder, "markdown", seeds=r"_I\w+-\d+$", **GROUNDING)
    values = [
        100 * one["value"]
        for one in figures
        if (one["metric"], one["task"], one["modality"]) == ("mDice", "MeCoVQA_Grounding_test", "all")
    ]
    (row,) = (line for line in text.splitlines() if line.startswith("| stage "))
    assert row.split("|")[2].strip() == f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f} (2)"
    assert r"$\pm$" in make(folder, "latex", seeds=r"_I\w+-\d+$", **GROUNDING)
    with pytest.raises(ValueError, match=r"--seeds '\('"):
        make(folder, "latex", seeds="(", **GROUNDING)


def test_modalities_are_columns(folder, figures):
    text = make(folder, "markdown", tasks="MeCoVQA_Grounding*", modality="all,ct,mr")
    head = text.splitlines()[0]
    assert "mDice, all records" in head and "mDice, ct" in head and "mDice, mr" in head


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("pdflatex"), reason="no pdflatex here (Debian: texlive-latex-recommended)")
def test_latex_compiles(folder, tmp_path):
    tables = [make(folder, "latex", metrics="*", modality="*"), make(folder, "latex", seeds=r"_I\w+-\d+$")]
    head = r"\documentclass{article}\usepackage[utf8]{inputenc}\usepackage[T1]{fontenc}\usepackage{booktabs,textcomp}"
    text = "\n\n".join([head, r"\begin{document}\tiny", *tables, r"\end{document}"])
    (tmp_path / "paper.tex").write_text(text)
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "paper.tex"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "paper.pdf").exists(), done.stdout[-2000:]


def test_what_is_not_there_is_one_line(folder, tmp_path, monkeypatch, capsys):
    for arguments, message in (
        (["--workdir", str(folder), "--tasks", "lost"], "no figure is selected; there are .*MeCoVQA_Grounding_test"),
        (["--workdir", str(tmp_path)], "sweep.json"),
    ):
        monkeypatch.setattr(sys, "argv", ["table", *arguments])
        with pytest.raises(SystemExit, match=f"error: .*{message}"):
            table.main()
    monkeypatch.setattr(sys, "argv", ["table", "--workdir", str(folder), "--out", str(tmp_path / "table.md")])
    table.main()
    assert (tmp_path / "table.md").read_text() == make(folder, "markdown")
