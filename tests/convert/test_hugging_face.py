"""Tiny checkpoints that transformers itself writes: its logits and its greedy tokens are ours."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from convert import check, from_torch, to_torch
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.models.layers import bind
from tests.convert.conftest import TINY, TOKENIZER, load, random_tensors, write_folder
from tests.data.test_bpe_tokenizer import write_bpe

LLM = {
    "vocab_size": 400,
    "hidden_size": 36,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
IDS = [1, *range(260, 300)]
PATCHES = 4


def written(folder, model):
    """The model's folder with large enough weights that choices are clear, and with the tokenizer of 400 pieces."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value) * (0.3 if value.ndim > 1 else 0.1) + (value.ndim == 1))
    model.eval().save_pretrained(folder)
    shutil.copyfile(TOKENIZER / "tokenizer.model", folder / "tokenizer.model")
    return model


def llava(**vision):
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**LLM | {"vocab_size": 448}),  # pieces, <image>, <pad> and padding
        vision_config=transformers.CLIPVisionConfig(**VISION | vision),
        image_token_index=400,
        image_seq_length=PATCHES,
    )
    return transformers.LlavaForConditionalGeneration(config)


def ours(workdir, shared, image=None):
    """(the JAX side, logits of the 41 ids, behind the picture's features if there is one, greedy continuation)."""
    side = check.OurSide(workdir, "float32", max_new_tokens=8)
    patches = PATCHES if image else 0
    batch = check.picture(image or check.made_up_images(workdir, 1)[0], side.config)
    asked = check.with_text(batch, IDS, patches)
    with jax.default_matmul_precision("highest"):
        read = jax.jit(lambda params, batch: check.read_model(bind(side.model, params), batch, shared))
        logits = np.asarray(read(side.params, asked)["logits"])
        made = side.generator(asked)
    return logits[:, :400], np.asarray(made.tokens)[0, : int(made.lengths[0])], asked


def agree(found, logits, tokens):
    np.testing.assert_allclose(found[0], logits[:, :400], atol=1e-4 * np.abs(logits).max())
    assert list(found[1]) == [token for token in tokens if token != 2]


def greedy(model, **inputs):
    with torch.no_grad():
        logits = model(**inputs).logits[0].numpy()
        # tokens beyond the pieces are never meant: ours are new, transformers' are padding
        made = model.generate(
            **inputs,
            max_new_tokens=8,
            do_sample=False,
            suppress_tokens=list(range(400, logits.shape[-1])),
            pad_token_id=0,
        )
    return logits, made[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize(
    "kind, changes",
    [
        (transformers.LlamaForCausalLM, {"tie_word_embeddings": True, "rope_theta": 1e5}),  # SmolLM2's shape
        (transformers.MistralForCausalLM, {"sliding_window": None}),  # LLaVA-Med v1.5's language model
    ],
)
def test_language_models(tmp_path, kind, changes):
    model = written(tmp_path / "source", kind(kind.config_class(**LLM | changes)))
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax"))
    agree(ours(tmp_path / "jax", {"llm"}), *greedy(model, input_ids=torch.tensor([IDS])))


def test_a_small_llama_with_a_byte_level_tokenizer(tmp_path):
    """SmolLM2's form: grouped queries, a tied head, no SentencePiece model."""
    write_bpe(tmp_path / "source")
    rows = len(transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "source/tokenizer.json")))
    config = transformers.LlamaConfig(**LLM | {"vocab_size": rows, "tie_word_embeddings": True})
    model = written(tmp_path / "source", transformers.LlamaForCausalLM(config))
    (tmp_path / "source/tokenizer.model").unlink()
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax"))
    tokenizer = load_tokenizer(str(tmp_path / "jax/tokenizer"))
    assert tokenizer.seg_id == rows and tokenizer.vocab_size == rows + 267
    assert rows == 400  # `greedy` and `agree` leave the tokens behind these out
    agree(ours(tmp_path / "jax", {"llm"}), *greedy(model, input_ids=torch.tensor([IDS])))


def test_llamas_own_tokenizer_json_is_no_tokenizer(tmp_path):
    written(tmp_path / "source", transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM)))
    (tmp_path / "source/tokenizer.model").unlink()
    (tmp_path / "source/tokenizer.json").write_text('{"model": {"type": "BPE", "byte_fallback": true}}')
    with pytest.raises(FileNotFoundError, match=r"no tokenizer.model, qwen.tiktoken, tokenizer.json beside"):
        from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax"))
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax", tokenizer=TOKENIZER))


def test_adapters_that_peft_saved(tmp_path):
    base = written(tmp_path / "base", transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLM)))
    wanted = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, wanted).eval()
    model.save_pretrained(tmp_path / "adapter")
    from_torch.convert(from_torch.Options((tmp_path / "adapter", tmp_path / "base"), tmp_path / "jax"))
    agree(ours(tmp_path / "jax", {"llm"}), *greedy(model, input_ids=torch.tensor([IDS])))


def as_version_4(folder):
    """The names that transformers 4 wrote, as in the released llava-1.5-7b-hf."""
    tensors = load_file(folder / "model.safetensors")
    old = {name.replace("vision_tower.", "vision_tower.vision_model."): x for name, x in tensors.items()}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("version", [4, 5])
def test_llava_of_both_versions(tmp_path, version):
    model = written(tmp_path / "source", llava())
    if version == 4:
        as_version_4(tmp_path / "source")
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax", fresh=("region", "seg_mlp")))
    image = check.made_up_images(tmp_path, 1)[0]
    found = ours(tmp_path / "jax", {"clip", "projector", "llm"}, image)
    agree(found, *greedy(model, **as_inputs(found[2], image_token=400)))


def as_inputs(asked, image_token: int) -> dict:
    """A batch of ours as transformers' LLaVA takes it."""
    ids = torch.tensor(np.where(np.asarray(asked.feature_index) >= 0, image_token, asked.tokens)).long()
    pixels = np.array(check.normalise_clip(asked.clip_pixels[:, 0]))
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.from_numpy(pixels).permute(0, 3, 1, 2),
    }


def test_the_way_out_is_what_transformers_loads(tmp_path):
    written(tmp_path / "source", llava())
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax", fresh=("region", "seg_mlp")))
    to_torch.main(["--checkpoint", str(tmp_path / "jax"), "--out", str(tmp_path / "hf"), "--layout", "hf_llava"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["image_token_index"], config["text_config"]["vocab_size"]) == (667, 704)
    model, report = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager"
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    image = check.made_up_images(tmp_path, 1)[0]
    found = ours(tmp_path / "jax", {"clip", "projector", "llm"}, image)
    agree(found, *greedy(model.eval(), **as_inputs(found[2], image_token=667)))
    # and back again, bit for bit; the two fresh parts have no place in it
    from_torch.convert(from_torch.Options((tmp_path / "hf",), tmp_path / "again", fresh=("region", "seg_mlp")))
    to_torch.convert(tmp_path / "again", tmp_path / "second", layout="hf_llava")
    first, second = load(tmp_path / "hf"), load(tmp_path / "second")
    assert first.keys() == second.keys() and all((first[name] == second[name]).all() for name in first)


def test_the_tokenizer_of_the_way_out_is_ours(tmp_path):
    written(tmp_path / "source", llava())
    from_torch.convert(from_torch.Options((tmp_path / "source",), tmp_path / "jax"))
    to_torch.convert(tmp_path / "jax", tmp_path / "hf", layout="hf_llava")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids(["<image>", "<SEG>", "<im_end>", "</s>"]) == [667, 400, 666, 2]


def test_a_model_with_experts_is_no_llava(tmp_path):
    source = write_folder(tmp_path / "source", TINY, random_tensors(TINY))
    from_torch.convert(from_torch.Options((source,), tmp_path / "jax"))
    with pytest.raises(ValueError, match="hf_llava writes models of stages I and II; this one has experts"):
        to_torch.convert(tmp_path / "jax", tmp_path / "hf", layout="hf_llava")
    assert not (tmp_path / "hf").exists()
