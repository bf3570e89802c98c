"""Qwen-VL's weights there and back, bit for bit, and every name of the released model."""

import dataclasses
import gzip
import json
import pickle
import shutil

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

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


def test_adapters_of_finetune_py_are_there_and_back_bit_exact(tmp_path):
    source(tmp_path / "torch", TYPES["fp32"])
    rng, adapter = np.random.default_rng(1), {}
    for layer in range(LLM.num_layers):
        for target, (out, width) in {
            "attn.c_attn": (3 * LLM.hidden_size, LLM.hidden_size),
            "attn.c_proj": (LLM.hidden_size, LLM.hidden_size),
            "mlp.w1": (LLM.mlp_dim, LLM.hidden_size),
            "mlp.w2": (LLM.mlp_dim, LLM.hidden_size),
        }.items():
            name = f"base_model.model.transformer.h.{layer}.{target}"
            adapter[f"{name}.lora_A.weight"] = rng.standard_normal((4, width), np.float32)
            adapter[f"{name}.lora_B.weight"] = rng.standard_normal((out, 4), np.float32)
    (tmp_path / "adapter").mkdir()
    safetensors.numpy.save_file(adapter, tmp_path / "adapter" / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": 4, "lora_alpha": 16, "lora_dropout": 0.05, "bias": "none"}
    described["target_modules"] = ["c_attn", "attn.c_proj", "w1", "w2"]
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(described))
    from_torch.convert(from_torch.Options((tmp_path / "adapter", tmp_path / "torch"), tmp_path / "jax"))
    to_torch.convert(tmp_path / "jax", tmp_path / "back", layout="peft")
    back = safetensors.numpy.load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert back.keys() == adapter.keys()
    assert not [name for name, tensor in adapter.items() if back[name].tobytes() != tensor.tobytes()]


def paddle_name(key):
    """The name in BiRD's checkpoints."""
    for old, new in (("transformer.visual.", "visual."), ("transformer.", "transformer.llm.")):
        if key.startswith(old):
            inside = key.removeprefix(old)
            vit = old.endswith("visual.") and not inside.startswith(("attn_pool.", "ln_post.", "proj"))
            return new + ("vit." if vit else "") + inside
    return key


def write_paddle(file, tensors, head_is_table=False):
    """As `paddle.save` writes a state: NumPy arrays, weights of linear layers (in, out), bfloat16 as bits."""
    named = {}
    for key, tensor in tensors.items():
        linear = tensor.ndim == 2 and key.endswith("weight") and not key.endswith("wte.weight")
        turned = tensor.T.copy() if linear and not (head_is_table and key == "lm_head.weight") else tensor
        named[paddle_name(key)] = turned.view(np.uint16) if tensor.dtype == TYPES["bf16"] else turned
    file.write_bytes(pickle.dumps(named | {"StructuredToParameterName@@": {}}, protocol=4))


@pytest.mark.parametrize(("dtype", "head_is_table"), [("bf16", False), ("fp32", True)])
def test_birds_own_checkpoints_are_read(dtype, head_is_table, tmp_path):
    tensors = source(tmp_path / "torch", TYPES[dtype])
    names = json.loads(gzip.decompress((TEXT / "keys_qwen_vl_7b.json.gz").read_bytes()))["paddle_names"]
    assert {key: paddle_name(key) for key in names} == names
    for file in (tmp_path / "torch").glob("*.safetensors*"):
        file.unlink()
    write_paddle(tmp_path / "model_state.pdparams", tensors, head_is_table)
    options = from_torch.Options((tmp_path / "model_state.pdparams",), tmp_path / "jax", config=tmp_path / "torch")
    from_torch.convert(options)
    to_torch.convert(tmp_path / "jax", tmp_path / "back", "safetensors")
    back = torch_files.read_folder(tmp_path / "back")
    assert back.keys() == tensors.keys()
    assert not [key for key, tensor in tensors.items() if back[key].read().tobytes() != tensor.tobytes()]


class Harmful:
    def __reduce__(self):
        return print, ("loaded",)


def test_a_pickle_that_holds_more_than_arrays_is_refused(tmp_path, capsys):
    file = tmp_path / "model_state.pdparams"
    file.write_bytes(pickle.dumps({"lm_head.weight": Harmful()}, protocol=4))
    with pytest.raises(ValueError, match="the pickle asks for builtins.print, which could run code"):
        torch_files.read_file(file)
    assert not capsys.readouterr().out
    for content, what in (
        (pickle.dumps({"x": np.zeros(3)})[:-40], "damaged"),
        (pickle.dumps([np.zeros(3)]), "expected a dictionary of arrays, found list"),
        (pickle.dumps({"x": "words"}), "'x': expected an array of numbers, found str"),
        (pickle.dumps({"UnpackBigParamInfor@@": {}}), "save it anew with paddle.save"),
        (pickle.dumps({3: np.zeros(3)}), "expected names of arrays, found 3"),
        (b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x01\x00\x00\x00b\x86R.", "damaged: unknown encoding"),
        (b"\x80\x04cnumpy\nndarray\n\x8a\x08" + b"\xff" * 7 + b"\x0f\x85\x85R.", "damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=what):
            torch_files.read_file(file)


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


@pytest.mark.parametrize("scaling", [{"use_dynamic_ntk": False}, {"use_logn_attn": False}, {}])
def test_each_way_to_scale_long_prompts_comes_from_the_configuration_and_goes_back(scaling):
    keys = json.loads(gzip.decompress((TEXT / "keys_qwen_vl_7b.json.gz").read_bytes()))
    shapes = {key: tuple(shape) for key, shape in keys["shapes"].items()}
    config = kinds.detect_config(shapes, foreign(keys["config"] | scaling))
    written = qwen_vl.model_json(config, {}, TYPES["bf16"], 151857, {})
    for name in ("use_dynamic_ntk", "use_logn_attn"):
        assert written[name] == scaling.get(name, True)
    assert (config.llm.ntk, config.llm.log_n) == (written["use_dynamic_ntk"], written["use_logn_attn"])


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
