"""What conversion refuses, and that it leaves nothing behind."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

from convert import from_torch, to_torch, torch_files, vocabulary
from medplib_jax import checkpoint
from tests.convert.conftest import TINY, TOKENIZER, random_tensors, save, write_folder


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(TINY)


@pytest.fixture
def source(tmp_path, tensors):
    return write_folder(tmp_path / "source", TINY, tensors)


def refused(source, error, match, **options):
    out = source.parent / "jax"
    before = sorted(source.parent.iterdir())
    with pytest.raises(error, match=match):
        from_torch.convert(from_torch.Options((source,), out, **options))
    assert sorted(source.parent.iterdir()) == before


def rewrite(source, tensors):
    save(source / "model.safetensors", tensors)


def test_truncated_safetensors(source):
    path = source / "model.safetensors"
    os.truncate(path, path.stat().st_size - 100)
    refused(source, ValueError, "model.safetensors: truncated, damaged or not a safetensors file")
    os.truncate(path, 50)
    refused(source, ValueError, "model.safetensors: truncated, damaged or not a safetensors file")


def test_truncated_pickle(source, tensors):
    (source / "model.safetensors").unlink()
    save(source / "pytorch_model.bin", tensors)
    os.truncate(source / "pytorch_model.bin", (source / "pytorch_model.bin").stat().st_size // 2)
    refused(source, ValueError, "pytorch_model.bin: truncated or damaged")


def test_missing_shard(source, tensors):
    (source / "model.safetensors").unlink()
    save(source / "model-00001-of-00002.safetensors", tensors)
    refused(source, FileNotFoundError, "shard model-00002-of-00002.safetensors is missing")
    (source / "model-00001-of-00002.safetensors").rename(source / "model.safetensors")
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"model.more.weight": "model-b.safetensors"}})
    )
    refused(
        source,
        FileNotFoundError,
        "'model.more.weight' is in no file, and the shard model-b.safetensors that should hold it is missing",
    )


def test_wrong_shape_missing_and_unknown_tensors(source, tensors):
    rewrite(source, tensors | {"model.layers.1.self_attn.q_proj.weight": np.zeros((16, 15), np.float32)})
    refused(source, ValueError, r"layers.1.self_attn.q_proj.weight: expected shape \(16, 16\), found \(16, 15\)")
    rewrite(source, {name: x for name, x in tensors.items() if "text_hidden_fcs" not in name})
    refused(source, ValueError, "4 tensors of the model are not in the source: model.text_hidden_fcs.0.0.bias")
    rewrite(source, tensors | {"model.layers.1.self_attn.q_norm.weight": np.zeros(16, np.float32)})
    refused(
        source, ValueError, "1 tensors of the source have no place in the model: model.layers.1.self_attn.q_norm.weight"
    )


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_values_that_are_not_finite(dtype, value):
    x = np.ones((3, 4)).astype(from_torch.DTYPES[dtype])
    torch_files.check_finite("w", TOKENIZER, -x)
    torch_files.check_finite("w", TOKENIZER, x * 60000)
    x[1, 2] = value
    with pytest.raises(ValueError, match="tensor 'w' holds NaN or infinite values"):
        torch_files.check_finite("w", TOKENIZER, x)


def test_weights_with_nan(source, tensors):
    bad = tensors["lm_head.weight"].copy()
    bad[3, 4] = np.nan
    rewrite(source, tensors | {"lm_head.weight": bad})
    refused(source, ValueError, "model.safetensors: tensor 'lm_head.weight' holds NaN or infinite values")


class Code:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_pickle_with_code(source, tmp_path, monkeypatch):
    import torch

    monkeypatch.chdir(tmp_path)
    (source / "model.safetensors").unlink()
    for write in (
        lambda: torch.save({"model": Code()}, source / "pytorch_model.bin"),
        lambda: (source / "pytorch_model.bin").write_bytes(pickle.dumps(Code())),
    ):
        write()
        refused(source, ValueError, "pytorch_model.bin: refused, the pickle holds more than tensors")
    assert not (tmp_path / "executed").exists()


def test_wrong_tokenizer(source, tensors, tmp_path):
    short = {
        name: x[:500] if name in ("model.embed_tokens.weight", "lm_head.weight") else x for name, x in tensors.items()
    }
    rewrite(source, short)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"vocab_size": 500}))
    refused(
        source,
        ValueError,
        "has 400 pieces and 267 added tokens, so the embedding should have 400 or 667 rows, but the weights have 500",
    )
    (source / "added_tokens.json").write_text(json.dumps({"<SEG>": 401}))
    refused(source, ValueError, "added_tokens.json: token '<SEG>': expected id 400, found 401")
    (source / "tokenizer.model").unlink()
    refused(source, FileNotFoundError, "no tokenizer.model, qwen.tiktoken, tokenizer.json beside the weights")
    other = tmp_path.parent / f"{tmp_path.name}_other"
    other.mkdir()
    (other / "tokenizer.model").write_bytes(b"another one")
    (source / "tokenizer.model").write_bytes((TOKENIZER / "tokenizer.model").read_bytes())
    refused(source, ValueError, "is another tokenizer than", tokenizer=other)


def test_new_rows_are_all_or_none():
    assert [vocabulary.fit(TOKENIZER, rows) for rows in (400, 667)] == [vocabulary.Rows(400, 267), vocabulary.Rows(667)]
    with pytest.raises(ValueError, match="wrong tokenizer"):
        vocabulary.fit(TOKENIZER, 402)


def test_options_that_do_not_fit(source, tmp_path):
    refused(source, ValueError, "--kind clip: what the sources hold together looks like medplib", kind="clip")
    refused(source, ValueError, r"--fresh \['head'\]: only", fresh=("head",))
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        from_torch.convert(from_torch.Options((tmp_path / "nowhere",), tmp_path / "jax"))
    with pytest.raises(FileExistsError, match="already exists"):
        from_torch.convert(from_torch.Options((source,), source))
    with pytest.raises(FileNotFoundError, match="expected a workdir"):
        to_torch.convert(source, tmp_path / "out")


def test_mixed_types_need_a_choice(source, tensors):
    rewrite(
        source,
        tensors
        | {
            "model.layers.1.self_attn.q_proj.weight": tensors["model.layers.1.self_attn.q_proj.weight"].astype(
                np.float16
            )
        },
    )
    refused(source, ValueError, "llm/layers/attn/q/kernel: its tensors are of types .*choose one with --dtype")


KILLED = """
import os, sys
from convert import from_torch, torch_files
count = 0
def die(*_):
    global count
    count += 1
    if count == 40:
        os.kill(os.getpid(), 9)
torch_files.check_finite = die
from_torch.main(["--source", sys.argv[1], "--out", sys.argv[2]])
"""


def test_a_killed_conversion_leaves_nothing_that_looks_whole(source, tmp_path):
    out = tmp_path / "jax"
    done = subprocess.run([sys.executable, "-c", KILLED, str(source), str(out)], capture_output=True)
    assert done.returncode == -9 and not out.exists()
    (left,) = [path for path in tmp_path.iterdir() if path != source]
    assert left.name.startswith(".jax.converting-")
    with pytest.raises(FileNotFoundError, match="no complete checkpoint"):
        checkpoint.load_params(str(left))
    # and the next attempt works
    from_torch.convert(from_torch.Options((source,), out))
    assert set(checkpoint.load_params(str(out))[1]) == {"clip", "projector", "region", "llm", "seg_mlp", "sam"}


def test_export_refuses_values_that_are_not_finite(source, tmp_path, monkeypatch):
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax"))
    monkeypatch.setattr(
        to_torch, "_read", lambda stored, path, index: np.full(stored.arrays[path][index].shape, np.nan, np.float32)
    )
    with pytest.raises(ValueError, match="holds NaN"):
        to_torch.convert(tmp_path / "jax", tmp_path / "torch")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax", "source"]
