"""The documented commands make what the configs of the 7B and of the sweep read, each from a small copy of what is
published.
"""

import importlib
import json
from pathlib import Path

import pytest

from configs import common, eval_sweep
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.icl import IclOptions, make_icl
from medplib_jax.datasets.import_dataset import import_dataset
from medplib_jax.datasets.processes import HERE
from tests.datasets import collection
from tests.datasets.icl_pairs import write_pairs
from tests.datasets.test_importers import CASES

STAGES = ("stage1_align", "stage2_vqa", "stage3_grounding", "stage4_moe", "stage5_icl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """data/ as the READMEs' commands fill it, from some twenty records."""
    folder = tmp_path_factory.mktemp("data")
    published = folder / "published"
    annotations = collection.make_annotations(published / "MeCoVQA")
    collection.write(annotations, "test/MeCoVQA_Complex_VQA_test.json", [collection.vqa(3)])
    collection.write(annotations, "test/MeCoVQA_Region_VQA_test.json", [collection.region(3)])
    for name in eval_sweep.ZERO_SHOT:
        collection.write(annotations, f"zeroshot4grounding/{name}.json", [collection.grounding(3)])
    images = collection.make_images(published / "SA-Med2D-20M")
    assemble(str(annotations), str(images), str(folder / "data/assembled"), HERE)
    for dataset in ("llava_med_alignment", *(dataset for dataset, _ in eval_sweep.IMPORTED.values())):
        CASES[dataset][0](published / dataset)
        import_dataset(dataset, str(published / dataset), str(folder / f"data/{dataset}"))
    CASES["med_grit"][0](published / "med_grit")
    write_pairs(folder / "data/pairs")
    make_icl(str(folder / "data/pairs"), str(folder / "data/icl"), IclOptions())
    for part in eval_sweep.MED_GRIT_PARTS:
        import_dataset("med_grit", str(published / "med_grit"), str(folder / f"data/med_grit_{part}"))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_every_source_of_the_7b_stages_is_made_by_the_documented_commands(data, stage, monkeypatch):
    monkeypatch.chdir(data)
    config = from_config_dict(importlib.import_module(f"configs.{stage}").get_config("7b"), ExperimentConfig)
    assert config.data.sources
    for name in config.data.sources:
        source = open_source(name, config.data.root or None)
        assert len(source) > 0 and source[0].images and source[0].turns


def test_every_task_of_the_sweep_is_made_by_the_documented_commands(data, monkeypatch):
    """BRISC has no importer: any file of grounding questions may lie there."""
    monkeypatch.chdir(data)
    tasks = from_config_dict(eval_sweep.get_config(), SweepConfig).tasks
    opened = {task.name: len(open_source(task.file, task.root or None)) for task in tasks if task.name != "BRISC"}
    assert len(opened) == 19 and all(opened.values())


def test_the_users_own_data_is_a_folder_or_a_split(data, monkeypatch, tmp_path):
    monkeypatch.chdir(data)
    split = common.assembled("grounding", "train")
    assert common.own_sources(split) == ((split,), "")
    (tmp_path / "train").mkdir()
    (tmp_path / "train/a.json").write_text(json.dumps([]))
    assert common.own_sources(str(tmp_path)) == ((str(tmp_path / "train/a.json"),), str(tmp_path))
