"""The loop on a handful of generated examples: resuming, stopping, refusing. Programs are compiled once and cached
for the module.
"""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from medplib_jax import checkpoint
from medplib_jax.config.base import from_config_dict
from medplib_jax.config.experiment import ExperimentConfig, TrainConfig
from medplib_jax.config.files import load_config
from medplib_jax.config.model import LoraConfig
from medplib_jax.data.tokenizers import ADDED_TOKENS, Tokenizer, train_tokenizer
from medplib_jax.parallel.compilation import Compilations
from medplib_jax.parallel.lock import FolderInUse, folder_lock
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.train import loop as train_module
from medplib_jax.train.loop import train
from medplib_jax.train.metrics_log import read_metrics
from tests import tiny_run
from tests.paths import ROOT

KILLED = """
import json, os, signal, sys
from medplib_jax.train import loop as train
from medplib_jax.config.base import from_dict
from medplib_jax.config.experiment import ExperimentConfig
from tests.train.test_loop import one_device

class Writer(train.MetricWriter):
    def write(self, step, metrics):
        super().write(step, metrics)
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

train.make_mesh, train.MetricWriter = one_device, Writer
train.train(from_dict(ExperimentConfig, json.load(open(sys.argv[1]))), sys.argv[2])
"""


def one_device(config):
    return make_mesh(config, jax.devices()[:1])


@pytest.fixture(autouse=True)
def use_one_device(monkeypatch):
    """Eight virtual devices would only cost time here."""
    monkeypatch.setattr(train_module, "make_mesh", one_device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small dataset with its tokenizer, and a compilation cache that this module and its subprocesses share."""
    folder = tmp_path_factory.mktemp("train")
    tiny_run.prepare(str(folder))
    jax.config.update("jax_compilation_cache_dir", str(folder / "cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield folder
    jax.config.update("jax_compilation_cache_dir", None)


@pytest.fixture
def config(folder):
    """8 steps, a checkpoint every 3."""
    return dataclasses.replace(
        tiny_run.experiment(str(folder)), train=TrainConfig(steps=8, checkpoint_every=3, log_every=1)
    )


def losses(workdir) -> dict[int, tuple[float, float]]:
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in read_metrics(str(workdir))}


@pytest.fixture(scope="module")
def whole(folder):
    return {}


@pytest.fixture
def uninterrupted(config, folder, whole):
    """Losses and result of a run from start to end."""
    if not whole:
        whole["result"] = train(config, str(folder / "whole"))
        whole["losses"] = losses(folder / "whole")
    return whole


def test_a_run_learns_and_returns_its_last_metrics(uninterrupted):
    sequence = uninterrupted["losses"]
    assert list(sequence) == list(range(1, 9)) and sequence[8][0] < sequence[1][0] - 0.5
    result = uninterrupted["result"]
    assert result["step"] == 8 and result["interrupted"] is None
    assert 0 < result["padding"] < 1 and result["data_wait"] > 0 and result["examples_per_second"] > 0


def test_resuming_after_sigkill_gives_the_same_losses(uninterrupted, config, folder, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.json"), str(tmp_path / "run")]
    assert subprocess.run(command, env=environment).returncode == -signal.SIGKILL
    written = losses(tmp_path / "run")
    assert list(written) == [1, 2, 3, 4, 5]
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"step": 7, "lo')  # as a killed write leaves it
    assert train(config, str(tmp_path / "run"))["step"] == 8
    resumed = losses(tmp_path / "run")
    assert resumed == uninterrupted["losses"] and written.items() <= resumed.items()


def test_another_rate_seed_number_of_steps_or_data_compiles_nothing_anew(uninterrupted, config, folder, tmp_path):
    """All programs of a run that was there before are found on disk."""
    records = json.loads((folder / "phantom/train/align.json").read_text())
    (tmp_path / "other.json").write_text(json.dumps(records[::-1]))
    changed = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=3e-4, warmup=0.5),
        train=dataclasses.replace(config.train, steps=5, seed=7),
        data=dataclasses.replace(config.data, sources=(str(tmp_path / "other.json"),)),
    )
    count = Compilations()
    result = train(changed, str(tmp_path / "run"))
    assert result["step"] == 5 and result["lr"] != uninterrupted["result"]["lr"]
    assert count.requested and count.cached == count.requested


@pytest.fixture
def stopped(config, tmp_path, monkeypatch):
    """stopped(number) -> (workdir, result) of a run that got this signal at step 4."""
    write = train_module.MetricWriter.write

    def stop(number):
        def interrupt(self, step, row):
            if step == 4:
                signal.raise_signal(number)
            write(self, step, row)

        with monkeypatch.context() as patch:
            patch.setattr(train_module.MetricWriter, "write", interrupt)
            return tmp_path / "run", train(config, str(tmp_path / "run"))

    return stop


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(uninterrupted, config, stopped, number):
    before = signal.getsignal(number)
    workdir, result = stopped(number)
    assert result["interrupted"] == number and result["step"] == 5 and (workdir / "checkpoints/5/state").exists()
    assert signal.getsignal(number) == before
    train(config, str(workdir))
    assert losses(workdir) == uninterrupted["losses"]


def test_a_damaged_checkpoint_costs_its_steps_only(uninterrupted, config, stopped, caplog):
    workdir, _ = stopped(signal.SIGTERM)
    for file in (workdir / "checkpoints/5/state").rglob("d/*"):
        file.write_bytes(file.read_bytes()[:-1])
    train(config, str(workdir))
    assert "checkpoints/5 is damaged" in caplog.text and len(list((workdir / "damaged").iterdir())) == 1
    assert losses(workdir) == uninterrupted["losses"]


def test_a_finished_workdir_returns_at_once_and_more_steps_continue_it(uninterrupted, config, folder, monkeypatch):
    def refuse(*_):
        raise AssertionError("data was read")

    monkeypatch.setattr(train_module, "make_loader", refuse)
    again = train(config, str(folder / "whole"))
    assert again["step"] == 8 and again["loss"] == uninterrupted["result"]["loss"]
    with pytest.raises(AssertionError, match="data was read"):
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=9)), str(folder / "whole"))


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_records(config, tmp_path):
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e30))
    with pytest.raises(FloatingPointError, match=r"step \d: not finite: loss (nan|inf).*align.json\[\d+\]"):
        train(config, str(tmp_path / "run"))
    before = losses(tmp_path / "run")
    assert before and all(np.isfinite(value).all() for value in before.values())


def test_another_model_cannot_resume_a_workdir(uninterrupted, config, folder):
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, lora=LoraConfig(rank=3)), train=TrainConfig(steps=9)
    )
    with pytest.raises(ValueError, match="cannot be resumed.*model.lora.rank: 2 in the checkpoint, 3 now"):
        train(other, str(folder / "whole"))


def test_a_tokenizer_of_another_size_is_refused(config, tmp_path):
    other = dataclasses.replace(
        config, model=dataclasses.replace(config.model, llm=dataclasses.replace(config.model.llm, vocab_size=41))
    )
    with pytest.raises(ValueError, match="model.llm.vocab_size is 41, but data.tokenizer .* has"):
        train(other, str(tmp_path / "run"))


def test_bad_records_are_skipped_by_name_or_refused(config, folder, tmp_path):
    records = json.loads((folder / "phantom/train/align.json").read_text())
    records[3]["image"] = "images/missing.png"
    (tmp_path / "bad.json").write_text(json.dumps(records))
    data = dataclasses.replace(config.data, sources=(str(tmp_path / "bad.json"),), on_error="skip")
    config = dataclasses.replace(config, data=data, train=TrainConfig(steps=2, log_every=1))
    assert train(config, str(tmp_path / "run"))["skipped"] == 1
    (line,) = (tmp_path / "run/skipped.0.jsonl").read_text().splitlines()
    assert json.loads(line)["record"] == 3
    with pytest.raises(ValueError, match=r"bad.json, record 3.*missing"):
        train(dataclasses.replace(config, data=dataclasses.replace(data, on_error="raise")), str(tmp_path / "other"))


def changed(config, **fields):
    """The config with fields of its sections replaced: optim__lr=1."""
    for name, value in fields.items():
        section, field = name.split("__")
        config = dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **{field: value})}
        )
    return config


@pytest.fixture
def workdir(uninterrupted, folder, tmp_path):
    """A copy of the finished run, of 8 steps."""
    shutil.copytree(folder / "whole", tmp_path / "copy")
    return tmp_path / "copy"


def test_a_checkpoint_that_is_not_understood_is_refused_and_nothing_is_touched(config, workdir):
    for file in workdir.glob("checkpoints/*/experiment/metadata"):
        file.write_text(file.read_text().replace('"clip_norm"', '"max_norm"'))
    before = (workdir / "metrics.jsonl").read_text()
    with pytest.raises(ValueError, match="checkpoints/8/experiment.*max_norm"):
        train(changed(config, train__steps=12), str(workdir))
    assert (workdir / "metrics.jsonl").read_text() == before


def test_what_touches_no_parameter_may_change_on_resume(config, workdir):
    model = dataclasses.replace(
        config.model, remat="full", scan_unroll=2, lora=dataclasses.replace(config.model.lora, dropout=0.0)
    )
    other = changed(config, train__steps=9, optim__lr_scale=(("lora_", 3.0),))
    result = train(dataclasses.replace(other, model=model), str(workdir))
    assert result["step"] == 9 and not (workdir / "damaged").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__batch_size": 4}, "data.batch_size: 8 in the checkpoint, 4 now; the position in the data is counted"),
        ({"optim__frozen_dtype": "bfloat16"}, "optim.frozen_dtype: 'float32' in the checkpoint, 'bfloat16' now"),
        ({"model__lora": LoraConfig(rank=2, targets=("q",))}, "model.lora.alpha: 4.0 .*; model.lora.targets"),
    ],
)
def test_what_gives_the_state_its_meaning_may_not(config, workdir, fields, message):
    with pytest.raises(ValueError, match=f"cannot be resumed with this config: {message}"):
        train(changed(config, train__steps=9, **fields), str(workdir))


def test_another_tokenizer_of_the_same_size_is_refused_on_resume(config, workdir, other_tokenizer):
    with pytest.raises(
        ValueError, match=f"checkpoints/8: its tokenizer is not that of data.tokenizer '{other_tokenizer}"
    ):
        train(changed(config, train__steps=9, data__tokenizer=other_tokenizer), str(workdir))


def test_a_workdir_in_use_is_refused(config, workdir):
    with folder_lock(workdir / train_module.LOCK), pytest.raises(FolderInUse, match=f"in use by process {os.getpid()}"):
        train(changed(config, train__steps=9), str(workdir))


@pytest.fixture(scope="module")
def other_tokenizer(folder):
    """Another vocabulary of the same size."""
    size = tiny_run.experiment(str(folder)).model.llm.vocab_size - len(ADDED_TOKENS)
    words = ("".join(letters) for letters in itertools.permutations("qwertz"))
    train_tokenizer((" ".join([word, word[::-1]]) for word in words), str(folder / "other"), size)
    return str(folder / "other")


def test_another_run_starts_from_a_step_of_this_one_with_its_sizes_and_tokenizer(config, folder, workdir, tmp_path):
    """Whatever the config says of sizes: here twice as many heads of half the width, and other buckets for other
    pictures.
    """
    base = f"{workdir}/checkpoints/6"
    clip = dataclasses.replace(config.model.clip, image_size=42)
    llm = dataclasses.replace(config.model.llm, num_layers=3, rope_theta=1e6, max_positions=384)
    other = dataclasses.replace(config, model=dataclasses.replace(config.model, clip=clip, llm=llm))
    other = changed(other, init__base=base, init__sizes="base", data__tokenizer="", train__steps=2)
    with_9_patches = changed(other, data__bucket_lengths=(tiny_run.LENGTH - 1,))
    train(with_9_patches, str(tmp_path / "run"))
    saved, tokenizer = checkpoint.load_experiment(tmp_path / "run")
    assert saved.model == config.model
    assert saved.data.bucket_lengths == (tiny_run.LENGTH - 1 + 4 - 9,)
    assert Tokenizer.load(tokenizer).fingerprint == Tokenizer.load(config.data.tokenizer).fingerprint
    shutil.rmtree(workdir)  # the run needs its base no more
    assert train(changed(with_9_patches, train__steps=3), str(tmp_path / "run"))["step"] == 3


@pytest.mark.parametrize(
    ("part", "fields"),
    [
        ("llm", {"rope_theta": 1e6}),
        ("llm", {"num_heads": 4, "num_kv_heads": 4}),
        ("llm", {"max_positions": 1024}),
        ("clip", {"num_heads": 4}),
        ("mask", {"decoder_heads": 4}),
    ],
)
def test_weights_are_not_taken_for_another_models(config, workdir, tmp_path, part, fields):
    """No shape differs."""
    model = dataclasses.replace(config.model, **{part: dataclasses.replace(getattr(config.model, part), **fields)})
    other = changed(dataclasses.replace(config, model=model), init__base=str(workdir))
    name = f"model.{part}.{next(iter(fields))}"
    with pytest.raises(ValueError, match=rf"init.base .*copy: these weights are of another model: {name}: .* now"):
        train(other, str(tmp_path / "run"))


def test_weights_are_not_taken_with_another_tokenizer(config, workdir, tmp_path, other_tokenizer):
    with pytest.raises(ValueError, match="init.base .*copy: its tokenizer is not that of data.tokenizer"):
        train(changed(config, init__base=str(workdir), data__tokenizer=other_tokenizer), str(tmp_path / "run"))


def test_a_run_of_no_steps_is_refused(config, tmp_path):
    empty = changed(config, train__steps=0)
    object.__setattr__(empty.train, "epochs", -1.0)  # whatever the config lets pass
    with pytest.raises(ValueError, match="train.epochs -1.0 give -.* steps, expected at least 1"):
        train(empty, str(tmp_path / "run"))


def test_evaluation_enters_the_metrics_and_ranks_the_checkpoints(config, uninterrupted, tmp_path):
    asked = []

    def make_evaluate(config, mesh):
        def evaluate(params, step):
            asked.append((step, sorted(params), mesh.size))
            return {"eval/loss": abs(step - 4.5), "eval/masks/mDice": 1.0 - abs(step - 5.5)}

        return evaluate

    evaluated = changed(config, train__eval_every=2, train__checkpoint_every=2, train__keep=1, train__keep_best=1)
    train(evaluated, str(tmp_path / "run"), make_evaluate)
    assert [step for step, _, _ in asked] == [2, 4, 6, 8] and "llm" in asked[0][1]
    rows = {row["step"]: row for row in read_metrics(str(tmp_path / "run"))}
    assert {step: row["eval/loss"] for step, row in rows.items() if "eval/loss" in row} == {
        2: 2.5,
        4: 0.5,
        6: 1.5,
        8: 3.5,
    }
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["4", "8"]
    assert losses(tmp_path / "run") == uninterrupted["losses"]  # evaluation changes nothing
    by_answers = changed(evaluated, train__keep_best_by="eval/masks/mDice", train__keep_best_is="highest")
    train(by_answers, str(tmp_path / "other"), make_evaluate)
    assert sorted(path.name for path in (tmp_path / "other/checkpoints").iterdir()) == ["6", "8"]
    with pytest.raises(ValueError, match=r"'eval/mDice' was not measured, expected one of \['eval/loss', 'eval/masks"):
        train(changed(evaluated, train__keep_best_by="eval/mDice"), str(tmp_path / "none"), make_evaluate)


def test_a_trace_of_the_steps_asked_for(config, tmp_path):
    train(changed(config, train__steps=4, train__profile="1:3"), str(tmp_path / "run"))
    (file,) = (tmp_path / "run/profile").rglob("*.xplane.pb")
    content = file.read_bytes()
    assert b"train" in content and b"step_num" in content


def test_an_error_loses_no_metrics(config, tmp_path, monkeypatch):
    read = train_module.train_batches

    def failing(*arguments):
        for number, batch in enumerate(read(*arguments)):
            if number == 5:
                raise OSError("the disk is gone")
            yield batch

    monkeypatch.setattr(train_module, "train_batches", failing)
    with pytest.raises(OSError, match="the disk is gone"):
        train(config, str(tmp_path / "run"))
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]


def test_the_parameters_are_listed_at_the_start(config, tmp_path, caplog):
    with caplog.at_level("INFO"):
        train(changed(config, train__steps=1), str(tmp_path / "run"))
    assert re.search(r"\nllm/head/kernel +16 x \d+ +float32 +yes +\(.*\) +[\d,]+\n", caplog.text)
    assert re.search(r"\nclip/class_embed +16 +float32 +no +\(.*\) +64\n", caplog.text)


@pytest.mark.parametrize("recipe", ["finetune_folder", "finetune_lora"])
def test_a_recipe_adapts_this_model_to_data_of_ones_own(recipe, folder, workdir, tmp_path):
    """With the base's sizes and tokenizer, and masks, which the base never saw."""
    shutil.copytree(folder / "phantom", tmp_path / "mine")
    for file in (tmp_path / "mine/train").glob("*.json"):
        if "Grounding" not in file.name:
            file.unlink()
    mine = from_config_dict(load_config(f"{recipe}:{tmp_path}/mine"), ExperimentConfig)
    few = {"train__steps": 1, "data__batch_size": 2, "data__workers": 0, "data__mask_canvas": 32}
    result = train(changed(mine, init__base=str(workdir), **few), str(tmp_path / "run"))
    assert result["step"] == 1 and result["masks"] > 0
    saved, _ = checkpoint.load_experiment(tmp_path / "run")
    base, _ = checkpoint.load_experiment(workdir)
    assert dataclasses.replace(saved.model, lora=base.model.lora, dtype="float32", remat="none") == base.model
    assert saved.model.lora.rank == (8 if recipe == "finetune_lora" else 0)
