"""The Python of the page "From Python" runs from its first line to its last, with a smaller model than the demo's."""

import dataclasses
import re
from pathlib import Path

import pytest

from medplib_jax.datasets.phantom import generate as phantom
from tests.evaluate.evaluators import tiny
from tests.paths import ROOT
from tests.test_readmes import save


@pytest.mark.slow
def test_the_page_runs_as_written(tmp_path, monkeypatch):
    pieces = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.M | re.S)
    monkeypatch.chdir(tmp_path)
    phantom.generate("runs/demo/phantom", 2, 2, seed=0, processes=1)
    small = tiny.make_experiment("runs/demo/tokenizer")
    data = dataclasses.replace(small.data, bucket_lengths=(384,))
    save(dataclasses.replace(small, data=data), Path("runs/demo/stage_IV"))
    names: dict = {}
    for piece in pieces:
        short = piece.replace("steps = 20", "steps = 2").replace("limit=20", "limit=2, max_new_tokens=2")
        exec(compile(short, "python.md", "exec"), names)
    assert {cell.checkpoint for cell in names["result"].cells} == {"stage_IV", "model"}
    assert (tmp_path / "runs/mine/evaluation/report.html").exists()
