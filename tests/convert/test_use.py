"""What conversion writes is what the rest of the project takes: predict and evaluate as it is, train as a start."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from convert import from_torch
from medplib_jax import checkpoint
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, InitConfig, OptimConfig, TrainConfig
from medplib_jax.config.model import MoeConfig
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.datasets.phantom.generate import FILES, generate
from medplib_jax.decode.predictor import Predictor
from medplib_jax.evaluate.sweep import run_sweep
from medplib_jax.evaluate.tasks import folder_tasks
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train import loop as train_module
from tests.convert.conftest import LORA, TINY, TOKENIZER, random_tensors, save, write_folder

pytestmark = pytest.mark.slow

GROUNDING = "MeCoVQA-Grounding"
DENSE = dataclasses.replace(TINY, moe=MoeConfig())


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "phantom"
    generate(folder, 8, 2, processes=1)
    return folder


def of_medplib(folder) -> from_torch.Options:
    return from_torch.Options(
        (write_folder(folder / "source", TINY, random_tensors(TINY)),), folder / "jax", kind="medplib", stage=4
    )


def of_adapters(folder) -> from_torch.Options:
    config = dataclasses.replace(TINY, lora=LORA)
    return from_torch.Options(
        (write_folder(folder / "source", config, random_tensors(config)),),
        folder / "jax",
        kind="lora",
        stage=4,
        lora_alpha=LORA.alpha,
    )


def of_llava(folder) -> from_torch.Options:
    """LLaVA without MedPLIB's tokens, CLIP and SAM-Med2D, each in a file of its own."""
    tensors, words = random_tensors(DENSE), Tokenizer.load(str(TOKENIZER)).seg_id
    small = dataclasses.replace(DENSE, llm=dataclasses.replace(DENSE.llm, vocab_size=words))
    language = ("model.layers.", "model.norm", "model.mm_projector", "model.embed", "lm_head")
    llava = write_folder(
        folder / "llava", small, {name: x[:words] for name, x in tensors.items() if name.startswith(language)}
    )
    (folder / "clip").mkdir()
    shutil.copyfile(llava / "clip/config.json", folder / "clip/config.json")
    tower, sam = "model.vision_tower.vision_tower.", "model.visual_model."
    save(
        folder / "clip/model.safetensors",
        {name.removeprefix(tower): x for name, x in tensors.items() if name.startswith(tower)},
    )
    save(folder / "sam.pth", {name.removeprefix(sam): x for name, x in tensors.items() if name.startswith(sam)})
    return from_torch.Options((llava, folder / "clip", folder / "sam.pth"), folder / "jax", fresh=("region", "seg_mlp"))


@pytest.mark.parametrize("options_of", [of_medplib, of_adapters, of_llava])
def test_predicts_evaluates_and_trains(options_of, data, tmp_path, monkeypatch):
    options = options_of(tmp_path)
    model = from_torch.convert(options)
    assert Tokenizer.load(str(options.out / "tokenizer")).vocab_size == model.llm.vocab_size == 667
    picture = next((data / "images").rglob("*.png"))
    assert isinstance(Predictor(str(options.out), max_new_tokens=3)(picture, "Please segment the lesion.").answer, str)
    tasks = folder_tasks(data / FILES["test"]["grounding"])
    result = run_sweep(
        SweepConfig(checkpoints=str(options.out), tasks=tasks, max_new_tokens=3, limit=2), tmp_path / "evaluation"
    )
    assert [cell.records for cell in result.cells] == [2]

    monkeypatch.setattr(train_module, "make_mesh", lambda mesh: make_mesh(mesh, from_torch.jax.devices()[:1]))
    merged = dataclasses.replace(model, lora=type(model.lora)())
    config = ExperimentConfig(
        model=merged,
        data=DataConfig(
            sources=(str(data / f"train/{GROUNDING}.json"),),
            root=str(data),
            tokenizer=str(options.out / "tokenizer"),
            bucket_lengths=(256,),
            batch_size=2,
            max_regions=1,
            max_masks=4,
            mask_canvas=32,
            workers=0,
        ),
        optim=OptimConfig(lr=0.0, trainable=("^llm/head/",), warmup=0),
        init=InitConfig(stage=1 if options_of is of_llava else 0, base=str(options.out)),
        train=TrainConfig(steps=1),
    )
    train_module.train(config, str(tmp_path / "run"))
    _, trained, _ = checkpoint.load_params(str(tmp_path / "run"))
    _, converted, _ = checkpoint.load_params(str(options.out))
    assert np.array_equal(trained["llm"]["head"]["kernel"], converted["llm"]["head"]["kernel"])
    assert json.loads((options.out / "huggingface/config.json").read_text())["model_type"]
