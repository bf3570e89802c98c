"""The decoder against transformers' LLaMA and the original's MoE decoder; cache, scan and remat against the plain
forward pass.
"""

import dataclasses
import typing

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from medplib_jax.config.base import field_types
from medplib_jax.config.model import LlmConfig, LoraConfig, ModelConfig, MoeConfig
from medplib_jax.models.language.attention import QUERY_BLOCK, attend, attend_within, rotary_frequencies
from medplib_jax.models.language.llama import Llama, init_cache, scan_plan
from medplib_jax.models.layers import abstract_module, bind, params_of
from medplib_jax.models.remat import POLICIES
from tests.paths import GOLDEN

TINY = LlmConfig(vocab_size=61, hidden_size=32, num_layers=4, num_heads=4, num_kv_heads=2, mlp_dim=48)


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def make(config: ModelConfig):
    return abstract_module(lambda rngs: Llama(config, rngs))


def random_model(config: ModelConfig):
    return make(config), params_of(Llama(config, nnx.Rngs(0)))


def from_torch(state: dict, config: ModelConfig) -> dict:
    """PyTorch's LLaMA (with DeepSpeed's names for experts) as our tree; what the state lacks is left out."""
    layers, tree = range(config.llm.num_layers), {"final_norm": {"scale": state["model.norm.weight"]}}
    dense = [i for i in layers if i not in config.moe_layers]

    def stack(name, indices, experts=None):
        names = [f"model.layers.{i}.{name}.weight" for i in indices]
        if experts is None:
            return {"kernel": np.stack([state[n].T for n in names])}
        return {"kernel": np.stack([[state[n.format(e)].T for e in range(experts)] for n in names])}

    tree["layers"] = {
        "attn": {name: stack(f"self_attn.{name}_proj", layers) for name in "qkvo"},
        "input_norm": {"scale": np.stack([state[f"model.layers.{i}.input_layernorm.weight"] for i in layers])},
        "post_norm": {"scale": np.stack([state[f"model.layers.{i}.post_attention_layernorm.weight"] for i in layers])},
    }
    if dense:
        tree["mlp"] = {name: stack(f"mlp.{name}_proj", dense) for name in ("gate", "up", "down")}
    if config.moe_layers:
        expert = "mlp.deepspeed_moe.experts.deepspeed_experts.{}."
        tree["moe"] = {
            "router": stack("mlp.deepspeed_moe.gate.wg", config.moe_layers),
            "experts": {
                n: stack(f"{expert}{n}_proj", config.moe_layers, config.moe.num_experts) for n in ("gate", "up", "down")
            },
        }
    tree["head"] = {"kernel": state["lm_head.weight"].T}
    if "model.embed_tokens.weight" in state:
        tree["embed"] = {"embedding": state["model.embed_tokens.weight"]}
    return tree


def test_transformers_logits_and_gradients():
    config = ModelConfig(llm=dataclasses.replace(TINY, rope_theta=500.0))
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
            attn_implementation="eager",
            pad_token_id=0,
        )
    ).float()
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.data = torch.randn(p.shape, generator=generator) * 0.3 + (p.dim() == 1)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 17))
    valid = np.arange(17) < np.array([[17], [11]])
    logits = theirs(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(valid).long()).logits
    weight = np.random.default_rng(1).standard_normal(logits.shape).astype(np.float32) * valid[..., None]
    (logits * torch.tensor(weight)).sum().backward()
    module = make(config)

    @jax.jit
    def objective(params):
        model = bind(module, params)
        logits = model.logits(model(model.embed(tokens), valid)[0])
        return jnp.sum(logits * weight), logits

    state = {name: p.detach().numpy() for name, p in theirs.named_parameters()}
    (_, ours), grads = jax.value_and_grad(objective, has_aux=True)(from_torch(state, config))
    close(ours[valid], logits.detach().numpy()[valid])
    expected = from_torch({name: p.grad.numpy() for name, p in theirs.named_parameters()}, config)
    jax.tree.map(lambda a, b: close(a, b, 1e-3), grads, expected)


GOLDEN_MODELS = {
    "llm_top1": MoeConfig(num_experts=2, capacity_factor=1.5, eval_capacity_factor=2.0),
    "llm_top2": MoeConfig(num_experts=3, top_k=2, layers="sparse", capacity_factor=1.5, eval_capacity_factor=2.0),
}
DROPS = {
    "llm_top1": {"capacity_factor": 0.7, "eval_capacity_factor": 0.9, "min_capacity": 4},
    "llm_top2": {"capacity_factor": 0.5, "eval_capacity_factor": 0.6},
}


@pytest.mark.parametrize("case", ["eval", "train", "drop_eval", "drop_train"])
@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_original_decoder(name, case):
    golden = np.load(GOLDEN / f"{name}.npz")
    moe = dataclasses.replace(
        GOLDEN_MODELS[name], dispatch="capacity", **(DROPS[name] if case.startswith("drop") else {})
    )
    config = ModelConfig(
        llm=LlmConfig(vocab_size=64, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=4, mlp_dim=128), moe=moe
    )
    hidden, out, logits = run_golden(golden, config, case)
    expect_golden(golden, case, hidden, out, logits)
    close(out["aux_loss"], golden[f"{case}/l_aux"].sum())
    kept = golden[f"{case}/kept"].sum(-1).reshape(len(config.moe_layers), -1)[:, golden["valid"].reshape(-1)]
    close(out["dropped"], 1 - kept.mean(-1) / moe.top_k, 1e-6) if case.startswith("drop") else close(
        out["dropped"], 0 * out["dropped"]
    )


def test_dropless_is_the_original_where_nothing_drops():
    golden = np.load(GOLDEN / "llm_top1.npz")
    llm = LlmConfig(vocab_size=64, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=4, mlp_dim=128)
    expect_golden(golden, "eval", *run_golden(golden, ModelConfig(llm=llm, moe=GOLDEN_MODELS["llm_top1"]), "eval"))


def run_golden(golden, config, case):
    params = from_torch({n.removeprefix("weights/"): golden[n] for n in golden if n.startswith("weights/")}, config)
    module, noise = make(config), golden.get(f"{case}/noise")

    @jax.jit
    def forward(params):
        model = bind(module, params | {"embed": {"embedding": jnp.zeros((64, 64))}})
        hidden, out = model(
            jnp.asarray(golden["embeddings"]), golden["valid"], train=case.endswith("train"), router_noise=noise
        )
        return hidden, out, model.logits(hidden)

    return forward(params)


def expect_golden(golden, case, hidden, out, logits):
    close(hidden[:, ::3], golden[f"{case}/hidden"])
    close(logits[:, ::9], golden[f"{case}/logits"])
    num_moe, _, num_experts = golden[f"{case}/router_logits"].shape
    close(out["router_logits"].reshape(num_moe, -1, num_experts), golden[f"{case}/router_logits"])
    first = out["expert_index"][..., 0].reshape(num_moe, -1)
    np.testing.assert_array_equal(first, golden[f"{case}/router_logits"].argmax(-1))


MOE_CONFIGS = {
    "plain": MoeConfig(),
    "dense": MoeConfig(num_experts=2),
    "sparse": MoeConfig(num_experts=3, top_k=2, layers="sparse"),
    "odd": MoeConfig(num_experts=2, layers=(1, 2), residual=True),
}


@pytest.mark.parametrize("kind", MOE_CONFIGS)
def test_cached_decoding_equals_the_full_pass(kind):
    """Prompts of different length, padded on the right, then single tokens:

    Each row as if it were alone and unpadded.
    """
    config = ModelConfig(llm=TINY, moe=MOE_CONFIGS[kind])
    module, params = random_model(config)
    tokens = np.random.default_rng(0).integers(0, 61, (3, 14))
    prompt_lengths = np.array([9, 4, 7])

    @jax.jit
    def full(params, tokens):
        model = bind(module, params)
        return model.logits(model(model.embed(tokens), jnp.ones(tokens.shape, bool))[0])

    @jax.jit
    def extend(params, cache, tokens, valid):
        model = bind(module, params)
        hidden, out = model(model.embed(tokens), valid, cache=cache)
        return model.logits(hidden), out["cache"]

    @jax.jit
    def begin(params, tokens, valid):
        model = bind(module, params)
        return model(model.embed(tokens), valid, new_cache=14)[1]["cache"]

    expected = np.asarray(full(params, tokens))
    prompt = np.where(np.arange(9) < prompt_lengths[:, None], tokens[:, :9], 0)
    logits, cache = extend(
        params, init_cache(config, 3, 14, jnp.float32), prompt, np.arange(9) < prompt_lengths[:, None]
    )
    for row, length in enumerate(prompt_lengths):
        close(logits[row, :length], expected[row, :length])
    cache = begin(params, prompt, np.arange(9) < prompt_lengths[:, None])
    for step in range(5):
        position = prompt_lengths + step
        logits, cache = extend(params, cache, tokens[np.arange(3), position][:, None], np.ones((3, 1), bool))
        close(logits[:, 0], expected[np.arange(3), position])
    np.testing.assert_array_equal(cache.length_B, prompt_lengths + 5)


@pytest.mark.parametrize(
    "kind, change",
    [
        ("dense", {"scan_unroll": 2}),
        ("dense", {"remat": "full"}),
        ("sparse", {"remat": "dots"}),
        ("odd", {"remat": "dots_no_batch"}),
    ],
)
def test_unrolling_and_remat_change_nothing(kind, change):
    llm = dataclasses.replace(TINY, num_layers=3 if kind == "odd" else 2)
    base = ModelConfig(llm=llm, moe=MOE_CONFIGS[kind], lora=LoraConfig(rank=2, dropout=0.3, targets=("q", "up")))
    _, params = random_model(base)
    tokens = np.random.default_rng(0).integers(0, 61, (2, 24))

    def value_and_grad(config):
        module = make(config)

        def loss(params):
            model = bind(module, params)
            hidden, out = model(model.embed(tokens), jnp.ones(tokens.shape, bool), train=True, rng=jax.random.key(3))
            return jnp.square(model.logits(hidden)).mean() + out["aux_loss"], out

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    ours, expected = value_and_grad(dataclasses.replace(base, **change)), value_and_grad(base)
    chex.assert_trees_all_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segmented", [False, True])
def test_attention_in_blocks_of_queries_equals_one_product(segmented):
    length = 2 * QUERY_BLOCK + 9
    q, k, v = (jax.random.normal(jax.random.key(i), (2, length, heads, 8)) for i, heads in enumerate((4, 2, 2)))
    valid = np.arange(length) < np.array([[length], [length - 20]])
    segment = np.where(valid, 1 + (np.arange(length) > 150), 0) if segmented else None
    position = np.broadcast_to(np.arange(length), (2, length))
    segments = None if segment is None else (segment, segment)
    expected = attend(q, k, v, query_position_BxL=position, key_valid_BxS=valid, segments=segments)
    close(
        np.where(valid[..., None, None], attend_within(q, k, v, valid, segment), 0),
        np.where(valid[..., None, None], expected, 0),
    )


def test_unknown_remat_policy_is_named():
    with pytest.raises(ValueError, match="model.remat 'some' is not one of"):
        ModelConfig(llm=TINY, remat="some")
    assert typing.get_args(field_types(ModelConfig)["remat"]) == ("none", *POLICIES, "auto")


def test_padding_changes_nothing_before_it():
    module, params = random_model(ModelConfig(llm=TINY, moe=MoeConfig(num_experts=2)))
    x = jax.random.normal(jax.random.key(0), (1, 12, 32))
    model = bind(module, params)
    alone, _ = model(x[:, :8], jnp.ones((1, 8), bool))
    padded, out = model(x, jnp.arange(12)[None] < 8)
    close(padded[:, :8], alone)
    close(out["expert_load"].sum(-1), np.ones(4))


@pytest.mark.parametrize(
    "kinds, plan",
    [
        ([0] * 4, [(0, 1, 4)]),
        ([1, 0] * 3, [(0, 2, 3)]),
        ([1, 0, 1, 0, 1], [(0, 2, 2), (4, 1, 1)]),
        ([1, 1, 0, 0], [(0, 1, 2), (2, 1, 2)]),
        ([1], [(0, 1, 1)]),
        ([0, 1, 1, 0], [(0, 1, 1), (1, 1, 2), (3, 1, 1)]),
    ],
)
def test_scan_plan(kinds, plan):
    assert scan_plan(kinds) == plan


@pytest.mark.parametrize(("width", "theta"), [(128, 1e4), (64, 1e4), (8, 1e4), (64, 1e5), (128, 5e5)])
def test_rotary_frequencies_are_llamas_to_the_bit(width, theta):
    """As transformers' `LlamaRotaryEmbedding` computes them, and as checkpoints hold them."""
    expected = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.int64).float() / width))
    np.testing.assert_array_equal(rotary_frequencies(width, theta), expected.numpy())


def test_the_embedding_of_padding_does_not_train():
    """The capacity rule's load balancing counts padding, and would train its row."""
    config = ModelConfig(llm=TINY, moe=MoeConfig(num_experts=2, dispatch="capacity", aux_loss_weight=0.1))
    model, params = random_model(config)
    tokens = np.array([[5, 9, 3, 0, 0]])

    def loss(params):
        llama = bind(model, params)
        hidden, out = llama(llama.embed(tokens), tokens > 0)
        return jnp.sum(hidden[:, :3] ** 2) + out["aux_loss"]

    rows = np.asarray(jax.jit(jax.grad(loss))(params)["embed"]["embedding"]).any(1)
    assert np.flatnonzero(rows).tolist() == [3, 5, 9]
