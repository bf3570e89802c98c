"""Every experiment file builds, says what it should, and no field of the config is unread."""

import dataclasses
import importlib
import json
import re

import pytest
from absl import flags
from ml_collections import config_flags

from configs import finetune_lora
from medplib_jax.batch import flatten
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.files import load_config
from medplib_jax.config.model import IclConfig
from medplib_jax.data.pipeline import make_loader
from medplib_jax.models.layers import params_of
from medplib_jax.train.optim import partition
from medplib_jax.train.step import abstract_model
from tests.paths import ROOT

STAGES = ("stage1_align", "stage2_vqa", "stage3_grounding", "stage4_moe", "stage5_icl")


def experiment(name: str, size: str) -> ExperimentConfig:
    return from_config_dict(importlib.import_module(f"configs.{name}").get_config(size), ExperimentConfig)


@pytest.mark.parametrize("size", ["tiny", "7b"])
@pytest.mark.parametrize("stage", range(5))
def test_stages_follow_each_other_and_their_patterns_match(stage, size):
    config = experiment(STAGES[stage], size)
    assert config.init.stage == stage + 1
    trainable, frozen = partition(
        params_of(abstract_model(config.model)), config.optim.trainable
    )  # a pattern without a match raises
    assert trainable and frozen
    assert config.init.base == ("" if (stage, size) == (0, "tiny") else config.init.base) and (
        stage == 0 or config.init.base
    )


def test_the_original_hyperparameters():
    two, three, four, five = (experiment(name, "7b") for name in STAGES[1:])
    assert [c.optim.lr for c in (two, three, four)] == [1e-4, 3e-4, 3e-4]
    assert [c.train.epochs for c in (two, three, four)] == [3, 10, 3]
    assert [c.data.batch_size for c in (two, three, four)] == [128] * 3
    assert [(c.model.lora.rank, c.model.lora.alpha, c.model.lora.dropout) for c in (two, three, four)] == [
        (16, 16, 0.05),
        (8, 16, 0.05),
        (8, 16, 0.05),
    ]
    assert dataclasses.astuple(three.loss)[:5] == (1, 5, 1, 1, 0) and dataclasses.astuple(four.loss)[:5] == (
        1,
        0.5,
        2,
        0,
        0,
    )
    assert len(four.model.moe_layers) == len(five.model.moe_layers) == 32
    assert (five.optim.lr, five.train.epochs, five.data.batch_size, five.data.bucket_lengths[-1]) == (
        3e-4,
        10,
        16,
        4096,
    )
    assert (five.model.lora.rank, five.model.lora.alpha, five.model.lora.dropout) == (8, 16, 0.05)
    assert five.model.lora.targets == ("gate", "up", "down")
    assert dataclasses.astuple(five.loss)[:5] == (1, 5, 1, 1, 0)
    assert five.model.icl == IclConfig("separate", compressed_tokens=256, mask_tokens=64)


def test_what_trains_in_stage_4():
    config = experiment("stage4_moe", "7b")
    trainable, _ = partition(params_of(abstract_model(config.model)), config.optim.trainable)
    parts = {
        re.sub(r"/(kernel|bias|scale|embedding)$", "", path)
        for path in flatten(trainable)
        if not path.startswith(("sam/", "region/", "seg_mlp/"))
    }
    experts = {f"llm/moe/experts/{name}/lora_{ab}" for name in ("gate", "up", "down") for ab in "ab"}
    assert parts == {
        "llm/embed",
        "llm/head",
        "llm/moe/router",
        *experts,
        *(f"llm/layers/attn/{n}/lora_{ab}" for n in "qv" for ab in "ab"),
    }
    assert {path.split("/")[1] for path in flatten(trainable) if path.startswith("sam/")} == {"mask_decoder"}


def test_what_trains_in_stage_5():
    config = experiment("stage5_icl", "7b")
    trainable, _ = partition(params_of(abstract_model(config.model)), config.optim.trainable)
    experts = {f"llm/moe/experts/{name}/lora_{ab}" for name in ("gate", "up", "down") for ab in "ab"}
    parts = {re.sub(r"^(icl/\w+|sam/\w+|seg_mlp)/.*", r"\1", path) for path in flatten(trainable)}
    assert parts == {"icl/compressor", "icl/mask_encoder", "sam/mask_decoder", "seg_mlp", *experts}


@pytest.fixture
def parse(monkeypatch):
    def parse(*arguments: str) -> ExperimentConfig:
        argv = ["train", *arguments]
        monkeypatch.setattr("sys.argv", argv)  # config_flags looks there for the fields that are overridden
        values = flags.FlagValues()
        holder = config_flags.DEFINE_config_dict("config", load_config("stage3_grounding:tiny"), flag_values=values)
        values(argv)
        return from_config_dict(holder.value, ExperimentConfig)

    return parse


def test_flags_change_fields(parse):
    config = parse(
        "--config.optim.lr=0.5",
        "--config.data.bucket_lengths=(128,256)",
        "--config.model.clip.num_layers=3",
        "--config.mesh.fsdp=2",
    )
    assert (config.optim.lr, config.data.bucket_lengths, config.model.clip.num_layers, config.mesh.fsdp) == (
        0.5,
        (128, 256),
        3,
        2,
    )


@pytest.mark.parametrize("argument", ["--config.optim.lrate=0.5", "--config.otpim.lr=0.5"])
def test_a_misspelt_field_on_the_command_line_is_an_error(parse, argument):
    with pytest.raises((AttributeError, KeyError, flags.Error), match="lrate|otpim"):
        parse(argument)


def test_an_unknown_size_lists_the_known_ones():
    with pytest.raises(ValueError, match="unknown size 'huge'.*7b, tiny"):
        experiment("stage1_align", "huge")


def test_a_folder_becomes_an_experiment(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(ValueError, match="found none"):
        experiment("finetune_folder", str(tmp_path))
    (tmp_path / "train" / "a.json").write_text(json.dumps([]))
    config = experiment("finetune_folder", str(tmp_path))
    assert config.data.sources == (str(tmp_path / "train" / "a.json"),) and config.data.root == str(tmp_path)
    for name, content in (
        ("manifest", {"records": 3}),
        ("slake_test", []),
        ("slake_validation", []),
        ("slake_train", []),
    ):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert experiment("finetune_folder", str(tmp_path)).data.sources == (str(tmp_path / "slake_train.json"),)


def test_eight_chips_train_a_row_each_of_a_folder_at_7b(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    config, lora = experiment("finetune_folder", f"7b_v5e8:{tmp_path}"), experiment("finetune_lora", str(tmp_path))
    assert (config.data.batch_size, config.mesh.fsdp, config.mesh.data) == (8, 8, 1)
    assert config.model == lora.model and config.optim == lora.optim and config.data.sources == lora.data.sources
    with pytest.raises(ValueError, match="gone"):
        experiment("finetune_folder", f"7b_v5e8:{tmp_path}/gone")


def test_what_fits_is_asked_without_data():
    config, lora = experiment("finetune_folder", "7b_v5e8"), finetune_lora.get_config()
    assert config.model == from_config_dict(lora, ExperimentConfig).model and config.mesh.fsdp == 8
    assert not config.data.sources and not lora.data.sources
    with pytest.raises(ValueError, match="data.sources names no annotation file"):
        make_loader(config.data, config.model)


def test_a_folder_of_boxes_becomes_an_experiment(tmp_path):
    for name in ("train/VG", "grit/train/VG", "grit/test/VG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.json").write_text("[]")
    written = experiment("bird_folder", str(tmp_path))  # by `write_qa`, whose own train/ holds masks
    assert written.data.sources == (str(tmp_path / "grit/train/VG.json"),) and written.data.root == str(tmp_path)
    imported = experiment("bird_folder", str(tmp_path / "grit"))
    assert imported.data.root == str(tmp_path / "grit") and imported.init.sizes == "base"


def fields(cls):
    for field in dataclasses.fields(cls):
        yield from fields(field.type) if dataclasses.is_dataclass(field.type) else [(cls.__name__, field.name)]


@pytest.mark.parametrize(("section", "name"), list(fields(ExperimentConfig)))
def test_every_field_is_read_somewhere(section, name):
    declared = [ROOT / "medplib_jax" / file for file in ("config.py", "experiment.py")]
    sources = [path for path in (ROOT / "medplib_jax").rglob("*.py") if path not in declared]
    within = section == "MeshConfig" or name in (
        "alpha",
        "max_positions",
    )  # by astuple, LoraConfig.scale, ExperimentConfig
    use = (
        rf'"{name}"' if section == "ShardingConfig" else rf"\.{name}\b"
    )  # rules are looked up by the name that a parameter carries
    assert within or any(re.search(use, path.read_text()) for path in sources)
