"""Two imported datasets, mixed by weights, train a model: from the published layouts to logged metrics."""

import dataclasses
import json

import numpy as np

from medplib_jax.config.experiment import DataConfig, OptimConfig, TrainConfig
from medplib_jax.config.model import LoraConfig, MoeConfig
from medplib_jax.data.pipeline import make_loader
from medplib_jax.data.tokenizers import Tokenizer, train_tokenizer
from medplib_jax.datasets.import_dataset import import_dataset
from medplib_jax.train import loop as train_module
from medplib_jax.train.metrics_log import read_metrics
from tests.datasets import test_importers
from tests.helpers import MODEL, tiny_experiment
from tests.train.test_loop import one_device

STEPS, BATCH = 6, 8


def test_a_run_on_two_imported_datasets(tmp_path, monkeypatch):
    monkeypatch.setattr(train_module, "make_mesh", one_device)
    sources, texts = [], []
    for name, layout in (("vqa_med", test_importers.vqa_med), ("slake_en", test_importers.slake)):
        layout(tmp_path / name / "source")
        import_dataset(name, str(tmp_path / name / "source"), str(tmp_path / name / "out"))
        sources.append(str(tmp_path / name / "out" / f"{name}_train.json"))
        with open(sources[-1]) as file:
            texts += [turn["value"] for record in json.load(file) for turn in record["conversations"]]
    train_tokenizer((text for text in texts * 20), str(tmp_path / "tokenizer"), 320)
    vocabulary = Tokenizer.load(str(tmp_path / "tokenizer")).vocab_size
    llm = dataclasses.replace(MODEL.llm, vocab_size=vocabulary, num_layers=1, max_positions=256)
    config = tiny_experiment(
        model=dataclasses.replace(MODEL, llm=llm, moe=MoeConfig(), lora=LoraConfig(rank=2)),
        data=DataConfig(
            sources=tuple(sources),
            weights=(1.0, 3.0),
            tokenizer=str(tmp_path / "tokenizer"),
            bucket_lengths=(256,),
            batch_size=BATCH,
            max_regions=0,
            max_masks=0,
            mask_canvas=8,
            workers=0,
        ),
        optim=OptimConfig(lr=1e-2, trainable=("lora_[ab]$", "^llm/head/", "^llm/embed/"), warmup=0),
        train=TrainConfig(steps=STEPS, log_every=1),
    )
    train_module.train(config, str(tmp_path / "run"))

    rows = list(read_metrics(str(tmp_path / "run")))
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1)) and rows[-1]["loss"] < rows[0]["loss"]
    assert all(row["examples_per_second"] > 0 and row["data_wait"] >= 0 for row in rows)
    loader = make_loader(config.data, config.model)
    plan, _ = loader.plan(config.train.seed)
    numbers = np.concatenate([plan.batch(step)[1] for step in range(STEPS * plan.steps_per_epoch)])
    files = [loader.record(int(number)).file for number in numbers[numbers >= 0]]
    assert abs(files.count(sources[0]) / len(files) - 1 / 4) < 0.1
