"""Qwen-VL's weights there and back, bit for bit, and every name of the released model."""

import dataclasses
import gzip
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from convert import check, from_torch, kinds, mapping, qwen_vl, to_torch, torch_files
from convert.foreign_config import OWN, Foreign
from medplib_jax import checkpoint
from medplib_jax.batch import flatten
from medplib_jax.models.layers import params_of
from tests import bird_tiny
from tests.convert import qwen_vl_checks as checks
from tests.paths import GOLDEN

TEXT = GOLDEN / "qwen_vl"
TYPES = {"fp32": np.dtype(np.float32), "bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16)}
LLM = dataclasses.replace(bird_tiny.MODEL.llm, max_positions=256, hidden_size=128)
MODEL = dataclasses.replace(
    bird_tiny.MODEL, vit=dataclasses.replace(bird_tiny.MODEL.vit, resampler_head_dim=128), llm=LLM
)


def foreign(language):
    return Foreign(language, {}, adapter={}, own={}, side=None)


def source(folder, dtype, file_format="safetensors", shard_bytes=20_000, drop=(), scale=1.0):
    """A folder of Qwen-VL's form with random weights; returns name -> tensor."""
    folder.mkdir()
    shapes = {path: leaf.shape for path, leaf in flatten(params_of(from_torch.model_shapes(MODEL))).items()}
    rng, tensors = np.random.default_rng(0), {}
    for key, place in mapping.entries(MODEL, shapes).items():
        if key not in drop:
            values = scale * rng.standard_normal(place.torch_shape(shapes[place.path]))
            tensors[key] = values.astype(dtype)
    planned = [torch_files.Planned(key, x.shape, x.dtype, lambda x=x: x) for key, x in tensors.items()]
    torch_files.write_shards(folder, planned, file_format, shard_bytes)
    (folder / "config.json").write_text(json.dumps(qwen_vl.model_json(MODEL, {}, dtype, 630, {})))
    shutil.copy(TEXT / "qwen.tiktoken", folder)
    return tensors


@pytest.mark.parametrize(("dtype", "file_format"), [("fp32", "safetensors"), ("bf16", "bin"), ("fp16", "safetensors")])
def test_there_and_back_is_bit_exact(dtype, file_format, tmp_path):
    tensors = source(tmp_path / "torch", TYPES[dtype], file_format)
    config = from_torch.convert(from_torch.Options((tmp_path / "torch",), tmp_path / "jax"))
    assert config.vit == MODEL.vit and config.llm == MODEL.llm
    to_torch.convert(tmp_path / "jax", tmp_path / "back", file_format)
    back = torch_files.read_folder(tmp_path / "back")
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        found = back[key].read()
        assert found.dtype == tensor.dtype and found.tobytes() == tensor.tobytes(), key
    written, given = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("back", "torch"))
    assert written.pop(OWN) and written == {key: value for key, value in given.items() if key != OWN}
    assert (tmp_path / "back/qwen.tiktoken").read_bytes() == (TEXT / "qwen.tiktoken").read_bytes()
    experiment, _, tokenizer = checkpoint.load_params(str(tmp_path / "jax"))
    assert experiment.data.template == "chatml" and tokenizer.endswith("tokenizer")


def test_every_name_of_the_released_model_has_its_place_both_ways():
    keys = json.loads(gzip.decompress((TEXT / "keys_qwen_vl_7b.json.gz").read_bytes()))
    assert not [row for row in checks.check_names(keys) if row.error]


def test_what_is_missing_or_too_much_is_named(tmp_path):
    source(tmp_path / "torch", TYPES["fp32"], drop=("transformer.visual.attn_pool.query",))
    with pytest.raises(ValueError, match="attn_pool.query"):
        from_torch.convert(from_torch.Options((tmp_path / "torch",), tmp_path / "jax"))
    assert not (tmp_path / "jax").exists()


def test_another_vocabulary_is_refused(tmp_path):
    source(tmp_path / "torch", TYPES["fp32"])
    lines = (TEXT / "qwen.tiktoken").read_bytes().splitlines(keepends=True)
    (tmp_path / "torch/qwen.tiktoken").write_bytes(b"".join(lines[:300]))
    with pytest.raises(ValueError, match="wrong tokenizer: <img> is token 514, but config.json says 630"):
        from_torch.convert(from_torch.Options((tmp_path / "torch",), tmp_path / "jax"))


def test_sizes_that_disagree_are_refused():
    keys = json.loads(gzip.decompress((TEXT / "keys_qwen_vl_7b.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in keys["shapes"].items()}
    with pytest.raises(ValueError, match="hidden_size 2048 disagrees with the tensors: 4096"):
        kinds.detect_config(shapes, foreign(keys["config"] | {"hidden_size": 2048}))
    with pytest.raises(ValueError, match="numbers of heads are in no tensor"):
        kinds.detect_config(shapes, foreign({}))


def test_plain_pytorch_says_the_same(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(check, "QUESTIONS", check.QUESTIONS[1:])
    source(tmp_path / "torch", TYPES["fp32"], scale=0.2)
    from_torch.convert(from_torch.Options((tmp_path / "torch",), tmp_path / "jax"))
    images = tmp_path / "images"
    images.mkdir()
    check.made_up_images(images, count=1)
    arguments = ["--torch", str(tmp_path / "torch"), "--checkpoint", str(tmp_path / "jax"), "--images", str(images)]
    with pytest.raises(SystemExit) as end:
        check.main([*arguments, "--max_new_tokens", "3"])
    *_, row, verdict = capsys.readouterr().out.splitlines()
    _, features, logits, _, greedy, *_ = row.strip("| ").split(" | ")
    assert (end.value.code, verdict, greedy) == (0, "the same model", "1.00")
    assert max(float(features), float(logits)) < 1e-4
