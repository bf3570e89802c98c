"""Folders as people have them: files that repeat each other, adapters beside a base, weights that are not ours."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from convert import from_torch, to_torch
from medplib_jax import checkpoint
from medplib_jax.config.model import MoeConfig
from tests.convert.conftest import LORA, TINY, load, random_tensors, save, write_folder

DENSE = dataclasses.replace(TINY, moe=MoeConfig())
PROJECTOR = "model.mm_projector.0.weight"
Q, HEAD = "model.layers.1.self_attn.q_proj", "lm_head"


def convert(out, *sources, **options):
    from_torch.convert(from_torch.Options(tuple(sources), out, **options))
    return checkpoint.load_params(str(out))


@pytest.fixture(scope="module")
def tensors():
    return random_tensors(DENSE)


def of_bins(folder, tensors, projector):
    """As llava-v1.5-7b was released: two shards, and the projector once more."""
    source = write_folder(folder, DENSE, tensors)
    (source / "model.safetensors").unlink()
    names = sorted(tensors)
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save(source / f"pytorch_model-0000{i}-of-00002.bin", {name: tensors[name] for name in part})
    save(source / "mm_projector.bin", {PROJECTOR: projector})
    return source


def test_a_tensor_that_is_twice_in_a_folder_is_one(tmp_path, tensors):
    source = of_bins(tmp_path / "llava", tensors, tensors[PROJECTOR].copy())
    _, params, _ = convert(tmp_path / "jax", source)
    np.testing.assert_array_equal(params["projector"]["fc1"]["kernel"], tensors[PROJECTOR].T)
    save(source / "mm_projector.bin", {PROJECTOR: tensors[PROJECTOR] + 1})
    with pytest.raises(
        ValueError, match="'model.mm_projector.0.weight' is also in mm_projector.bin, with other values"
    ):
        convert(tmp_path / "other", source)


def test_adapters_beside_their_base(tmp_path, tensors):
    """PEFT's files, what was trained beside the adapters, and one on lm_head, for which the model has no place."""
    base = write_folder(tmp_path / "base", DENSE, tensors)
    random, folder = np.random.default_rng(3), tmp_path / "lora"
    folder.mkdir()
    adapters = {f"{Q.replace('.1.', f'.{i}.')}.lora_A.weight": (4, 16) for i in range(3)}
    adapters |= {f"{Q.replace('.1.', f'.{i}.')}.lora_B.weight": (16, 4) for i in range(3)}
    adapters |= {f"{HEAD}.lora_A.weight": (4, 16), f"{HEAD}.lora_B.weight": (667, 4)}
    adapters = {name: random.standard_normal(shape, np.float32) for name, shape in adapters.items()}
    save(folder / "adapter_model.safetensors", {f"base_model.model.{name}": x for name, x in adapters.items()})
    trained = tensors[PROJECTOR] * 2
    save(folder / "non_lora_trainables.bin", {f"base_model.model.{PROJECTOR}": trained})
    written = {"peft_type": "LORA", "r": 4, "lora_alpha": 256, "use_rslora": True, "bias": "none"}
    written["base_model_name_or_path"] = "someone/llava"
    (folder / "adapter_config.json").write_text(json.dumps(written))
    experiment, params, _ = convert(tmp_path / "jax", folder, base)
    assert (experiment.model.lora.scale, experiment.model.lora.targets) == (128.0, ("q",))
    np.testing.assert_array_equal(params["projector"]["fc1"]["kernel"], trained.T)
    np.testing.assert_array_equal(params["llm"]["layers"]["attn"]["q"]["lora_a"][1], adapters[f"{Q}.lora_A.weight"].T)
    head = tensors["lm_head.weight"] + 128.0 * adapters["lm_head.lora_B.weight"] @ adapters["lm_head.lora_A.weight"]
    np.testing.assert_allclose(params["llm"]["head"]["kernel"], head.T, rtol=1e-5, atol=1e-4)
    assert "lora_a" not in params["llm"]["head"]
    with pytest.raises(
        ValueError, match="the sources hold adapters without their base; add --source with someone/llava"
    ):
        convert(tmp_path / "alone", folder)


@pytest.mark.parametrize(
    "name, dtype", [(f"{Q}.qweight", np.int32), (f"{Q}.SCB", np.float32), (f"{Q}.weight", np.int8)]
)
def test_quantised_weights_are_refused_as_what_they_are(tmp_path, name, dtype):
    save(tmp_path / "model.safetensors", {name: np.ones((4, 4), dtype)})
    with pytest.raises(
        ValueError, match=f"model.safetensors: '{name}' belongs to quantised weights .*original weights"
    ):
        convert(tmp_path / "jax", tmp_path)


def test_a_zero_checkpoint_says_how_to_put_it_together(tmp_path):
    (tmp_path / "zero_to_fp32.py").touch()
    (tmp_path / "global_step100").mkdir()
    with pytest.raises(
        FileNotFoundError, match="DeepSpeed ZeRO in parts; .*`python zero_to_fp32.py . pytorch_model.bin`"
    ):
        convert(tmp_path / "jax", tmp_path)
    torch.save({"optimizer": {}}, tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(FileNotFoundError, match="DeepSpeed ZeRO in parts"):
        convert(tmp_path / "jax", tmp_path)


def test_overflow_is_named_as_such(tmp_path, tensors):
    large = tensors[PROJECTOR].copy()
    large[1, 2] = 70000
    source = write_folder(tmp_path / "source", DENSE, tensors | {PROJECTOR: large})
    with pytest.raises(
        ValueError, match="mm_projector.0.weight' overflows float16: it reaches 7e.04, float16 ends at 6"
    ):
        convert(tmp_path / "half", source, dtype="fp16")
    convert(tmp_path / "jax", source)
    with pytest.raises(ValueError, match="mm_projector.0.weight' overflows float16"):
        to_torch.convert(tmp_path / "jax", tmp_path / "back", dtype="fp16")
    to_torch.convert(tmp_path / "jax", tmp_path / "back", dtype="bf16")
    written = load(tmp_path / "back")
    assert {x.dtype for x in written.values()} == {np.dtype(np.int16)}  # bits of bfloat16


def test_relative_paths_work_from_any_folder(tmp_path, tensors, monkeypatch):
    write_folder(tmp_path / "data" / "source", DENSE, tensors)
    monkeypatch.chdir(tmp_path / "data")
    from_torch.main(["--source", "source", "--out", "../made/jax"])
    monkeypatch.chdir(tmp_path / "made")
    to_torch.main(["--checkpoint", "jax/checkpoints/0", "--out", "back"])
    assert set(tensors) < set(load(tmp_path / "made" / "back"))


def test_mistakes_are_one_line(tmp_path):
    for command, arguments in (
        (from_torch.main, ["--source", str(tmp_path / "no"), "--out", str(tmp_path / "jax")]),
        (from_torch.main, ["--source", str(tmp_path), "--out", str(tmp_path / "jax")]),
        (to_torch.main, ["--checkpoint", str(tmp_path / "no"), "--out", str(tmp_path / "back")]),
    ):
        with pytest.raises(SystemExit) as end:
            command(arguments)
        assert isinstance(end.value.code, str) and "\n" not in end.value.code


def test_what_no_tensor_tells_comes_back(tmp_path):
    """Heads of CLIP and of the mask decoder, buckets, router settings: other values than any default."""
    model = dataclasses.replace(
        TINY,
        clip=dataclasses.replace(TINY.clip, num_heads=4, layer_norm_eps=1e-6, select_layer=-1),
        llm=dataclasses.replace(TINY.llm, num_heads=4, num_kv_heads=4, max_positions=300, rope_theta=5e5),
        mask=dataclasses.replace(TINY.mask, decoder_heads=4, unpad="reference"),
        moe=dataclasses.replace(TINY.moe, top_k=2, eval_capacity_factor=1.25, aux_loss_weight=0.02),
        lora=LORA,
        dtype="bfloat16",
    )
    source = write_folder(tmp_path / "source", model, random_tensors(model))
    experiment, params, tokenizer = convert(tmp_path / "first", source, lora_alpha=LORA.alpha)
    wanted = dataclasses.replace(
        experiment,
        model=dataclasses.replace(model, lora=dataclasses.replace(LORA, alpha=7.0, dropout=0.25)),
        data=dataclasses.replace(experiment.data, bucket_lengths=(128, 300), max_masks=3, tokenizer=tokenizer),
        eval=dataclasses.replace(experiment.eval, mask_threshold=0.25),
    )
    from medplib_jax.train.state import TrainState

    with checkpoint.make_manager(str(tmp_path / "run"), keep=1) as manager:
        state = TrainState(step=np.int32(1), trainable=params, frozen={}, opt_state={})
        checkpoint.save(manager, state, wanted, total_steps=1, loss=1.0)
        manager.wait_until_finished()
    to_torch.convert(tmp_path / "run", tmp_path / "torch", layout="lora")
    found, _, _ = convert(tmp_path / "second", tmp_path / "torch")
    back = dataclasses.replace(found.data, tokenizer=tokenizer)
    assert (found.model, back, found.eval) == (wanted.model, wanted.data, wanted.eval)
    # another vision tower of the same widths beside the weights is not taken in silence
    written = json.loads((tmp_path / "torch" / "clip" / "config.json").read_text())
    (tmp_path / "torch" / "clip" / "config.json").write_text(json.dumps(written | {"num_attention_heads": 2}))
    with pytest.raises(ValueError, match="CLIP: num_attention_heads 2, but medplib_jax.model.clip.num_heads 4"):
        convert(tmp_path / "third", tmp_path / "torch")


def test_peft_loads_what_is_written_for_it(tmp_path):
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    model = dataclasses.replace(DENSE, lora=LORA)
    language = ("model.layers.", "model.norm", "model.embed", "lm_head")
    tensors = {name: x * np.float32(0.3) for name, x in random_tensors(model).items() if name.startswith(language)}
    convert(tmp_path / "jax", write_folder(tmp_path / "source", model, tensors), lora_alpha=LORA.alpha)
    for layout in ("peft", "merged"):
        to_torch.main(["--checkpoint", str(tmp_path / "jax"), "--out", str(tmp_path / layout), "--layout", layout])
    ids = torch.arange(20)[None] * 17 % 667
    base = LlamaForCausalLM.from_pretrained(tmp_path / "peft" / "base")
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, tmp_path / "peft")(ids).logits
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits
    torch.testing.assert_close(adapted, merged, rtol=1e-4, atol=1e-4)
    assert (plain - merged).abs().max() > 0.1
    # and back: the adapters beside their base are the checkpoint again
    _, params, _ = convert(tmp_path / "again", tmp_path / "peft", tmp_path / "peft" / "base")
    experiment, first, _ = checkpoint.load_params(str(tmp_path / "jax"))
    assert experiment.model.lora == LORA
    np.testing.assert_array_equal(params["llm"]["mlp"]["down"]["lora_b"], first["llm"]["mlp"]["down"]["lora_b"])
