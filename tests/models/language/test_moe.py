"""The experts against DeepSpeed 0.13.1's arithmetic, and the ways of computing them against each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from medplib_jax.config.experiment import MeshConfig, ShardingConfig
from medplib_jax.config.model import LlmConfig, LoraConfig, MoeConfig
from medplib_jax.models.language import expert_exchange
from medplib_jax.models.language import moe as moe_module
from medplib_jax.models.language.expert_exchange import sort_by_expert
from medplib_jax.models.language.moe import MoeMlp
from medplib_jax.models.language.routing import Routing, expert_capacity, route_capacity, route_dropless
from medplib_jax.models.layers import abstract_module, bind, logical_axes, params_of
from medplib_jax.parallel.mesh import make_mesh
from medplib_jax.parallel.sharding import batch_sharding, param_shardings
from tests.paths import GOLDEN

UNIT = np.load(GOLDEN / "moe_unit.npz")
CASES = {
    "a": MoeConfig(num_experts=2, capacity_factor=1.5, eval_capacity_factor=2.0),
    "b": MoeConfig(num_experts=4, capacity_factor=1.0, eval_capacity_factor=1.0, min_capacity=4),
    "c": MoeConfig(num_experts=4, capacity_factor=0.5, eval_capacity_factor=0.25, min_capacity=12),
    "d": MoeConfig(num_experts=3, top_k=2, capacity_factor=1.0, eval_capacity_factor=2.0),
    "e": MoeConfig(num_experts=5, top_k=2, capacity_factor=0.55, eval_capacity_factor=0.7, min_capacity=4),
    "f": MoeConfig(num_experts=2, capacity_factor=1.0, eval_capacity_factor=1.0, residual=True),
    "g": MoeConfig(num_experts=3, top_k=2, capacity_factor=1.0, eval_capacity_factor=1.0, residual=True),
    "h": MoeConfig(num_experts=2, capacity_factor=1.5, eval_capacity_factor=2.0),
}


def close(actual, expected, tolerance=1e-4):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(np.abs(expected).max(), 1e-3))


def replace(moe: MoeConfig, **changes) -> MoeConfig:
    return MoeConfig(**(vars(moe) | changes))


def llm_config(width=16, mlp=24) -> LlmConfig:
    return LlmConfig(vocab_size=8, hidden_size=width, num_layers=1, num_heads=2, num_kv_heads=2, mlp_dim=mlp)


def torch_tree(prefix: str, moe: MoeConfig) -> dict:
    """DeepSpeed's parameters (or their gradients) as our tree."""
    experts = [f"{prefix}experts.{e}.{{}}_proj.weight" for e in range(moe.num_experts)]
    tree = {
        "router": {"kernel": UNIT[f"{prefix}gate.wg.weight"].T},
        "experts": {
            name: {"kernel": np.stack([UNIT[e.format(name)].T for e in experts])} for name in ("gate", "up", "down")
        },
    }
    if moe.residual:
        tree["residual"] = {
            name: {"kernel": UNIT[f"{prefix}mlp.{name}_proj.weight"].T} for name in ("gate", "up", "down")
        }
        tree["coefficient"] = {
            "kernel": UNIT[f"{prefix}coefficient.weight"].T,
            "bias": UNIT[f"{prefix}coefficient.bias"],
        }
    return tree


def make(moe: MoeConfig, lora=None, llm=None, rules=None):
    return abstract_module(lambda rngs: MoeMlp(llm or llm_config(), moe, lora or LoraConfig(), rngs, rules))


def run(module, params, x, **kwargs):
    kwargs.setdefault("valid_BxL", jnp.ones(x.shape[:2], bool))
    return jax.jit(lambda params, x: bind(module, params)(x, **kwargs))(params, jnp.asarray(x))


def test_capacity_of_every_token_count():
    table = np.load(GOLDEN / "moe_capacity_table.npz")["table"]
    ours = [expert_capacity(int(s), int(e), float(factor), int(least)) for s, e, factor, least in table[:, :4]]
    np.testing.assert_array_equal(ours, table[:, 4])


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_capacity(case, mode):
    moe = replace(CASES[case], dispatch="capacity")
    module, params = make(moe), torch_tree(f"{case}_param.", moe)
    x, noise = UNIT[f"{case}_x"], UNIT[f"{case}_{mode}_noise"]
    weight = np.random.RandomState(7).standard_normal(x.shape).astype(np.float32)

    @jax.jit
    def objective(params, x):
        y, out = run(module, params, x, train=mode == "train", noise_SxE=noise)
        return jnp.sum(y * weight) + 3 * out["aux_loss"], (y, out)

    (_, (y, out)), (grads, dx) = jax.value_and_grad(objective, argnums=(0, 1), has_aux=True)(params, x)
    close(y, UNIT[f"{case}_{mode}_y"])
    close(out["aux_loss"], UNIT[f"{case}_{mode}_l_aux"])
    close(dx, UNIT[f"{case}_{mode}_dx"], 1e-3)
    if f"{case}_{mode}_grad.gate.wg.weight" in UNIT:
        jax.tree.map(lambda ours, theirs: close(ours, theirs, 1e-3), grads, torch_tree(f"{case}_{mode}_grad.", moe))


@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_weights_and_capacity(case, mode):
    moe = CASES[case]
    x = UNIT[f"{case}_x"].reshape(-1, 16)
    logits = x @ UNIT[f"{case}_param.gate.wg.weight"].T
    factor = (moe.capacity_factor if mode == "train" else moe.eval_capacity_factor) * moe.top_k
    capacity = expert_capacity(len(x), moe.num_experts, factor, moe.min_capacity)
    assert capacity == UNIT[f"{case}_{mode}_capacity"]
    routing = route_capacity(
        jax.nn.softmax(logits), jnp.asarray(logits), moe.top_k, capacity, UNIT[f"{case}_{mode}_noise"]
    )
    weight_SxE = (jax.nn.one_hot(routing.expert, moe.num_experts) * routing.weight[..., None]).sum(1)
    close(weight_SxE, UNIT[f"{case}_{mode}_weight"])


@pytest.mark.parametrize("top_k", [1, 2])
def test_dropless_is_capacity_without_drops(top_k):
    moe = MoeConfig(num_experts=4, top_k=top_k, eval_capacity_factor=4.0, residual=True)
    x = jax.random.normal(jax.random.key(0), (2, 41, 16))
    params = params_of(MoeMlp(llm_config(), moe, LoraConfig(), nnx.Rngs(0)))

    def objective(dispatch):
        module = make(replace(moe, dispatch=dispatch))

        def f(params, x):
            y, out = run(module, params, x)
            return jnp.sum(jnp.sin(y)) + out["aux_loss"], y

        return jax.jit(jax.value_and_grad(f, argnums=(0, 1), has_aux=True))(params, x)

    dropless, capacity = objective("dropless"), objective("capacity")
    jax.tree.map(lambda a, b: close(a, b, 1e-5), dropless, capacity)
    # ... and both are the sum over the chosen experts, written out.
    probs = jax.nn.softmax(x.reshape(-1, 16) @ params["router"]["kernel"])
    routing = route_dropless(probs, top_k)
    experts = params["experts"]
    h = [jax.nn.silu(x @ experts["gate"]["kernel"][e]) * (x @ experts["up"]["kernel"][e]) for e in range(4)]
    each = jnp.stack([h[e] @ experts["down"]["kernel"][e] for e in range(4)], -2).reshape(-1, 4, 16)
    chosen = jnp.take_along_axis(each, routing.expert[..., None], 1) * routing.weight[..., None]
    y = run(make(replace(moe, residual=False)), {k: params[k] for k in ("router", "experts")}, x)[0]
    close(y.reshape(-1, 16), chosen.sum(1), 1e-5)


def test_top1_weight_is_the_probability_and_top2_renormalises():
    probs = jnp.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    close(route_dropless(probs, 1).weight, np.array([[0.5], [0.7]]))
    close(route_dropless(probs, 2).weight, np.array([[0.625, 0.375], [7 / 9, 2 / 9]]))


@pytest.mark.parametrize("top_k", [1, 2])
def test_few_tokens_take_the_same_value(top_k, monkeypatch):
    moe, lora = MoeConfig(num_experts=3, top_k=top_k), LoraConfig(rank=2, targets=("gate", "down"))
    module, x = make(moe, lora), jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = with_adapters(params_of(MoeMlp(llm_config(), moe, lora, nnx.Rngs(0))))
    few = run(module, params, x)[0]
    monkeypatch.setattr(moe_module, "FEW_TOKENS", 0)
    close(run(module, params, x)[0], few, 1e-5)


def with_adapters(params):
    """Adapters' second factors start at zero; give them values."""
    return jax.tree_util.tree_map_with_path(
        lambda path, a: 0.2 * jax.random.normal(jax.random.key(5), a.shape) if path[-1].key == "lora_b" else a, params
    )


def test_adapter_dropout_needs_an_rng_and_keeps_the_mean():
    moe, lora = MoeConfig(num_experts=2), LoraConfig(rank=2, dropout=0.4, targets=("down",))
    module, x = make(moe, lora), jax.random.normal(jax.random.key(0), (2, 30, 16))
    params = with_adapters(params_of(MoeMlp(llm_config(), moe, lora, nnx.Rngs(0))))
    plain = run(module, params, x)[0]
    draws = jax.jit(jax.vmap(lambda key: run(module, params, x, rng=key)[0]))(jax.random.split(jax.random.key(1), 800))
    assert np.abs(draws[0] - plain).max() > 0.1
    assert np.abs(draws.mean(0) - plain).max() < 6 * (draws.std(0) / 800**0.5).max()


def test_metrics_count_valid_tokens_only():
    moe = MoeConfig(num_experts=2, top_k=2, dispatch="capacity", eval_capacity_factor=0.25)
    module = make(moe)
    params = params_of(MoeMlp(llm_config(), moe, LoraConfig(), nnx.Rngs(0)))
    x, valid = jax.random.normal(jax.random.key(0), (2, 20, 16)), jnp.arange(20) < jnp.array([[20], [7]])
    _, out = run(module, params, x, valid_BxL=valid)
    chosen = np.asarray(out["expert_index"])[np.asarray(valid)]
    close(out["expert_load"], np.bincount(chosen.reshape(-1), minlength=2) / chosen.size)
    probs = jax.nn.softmax(out["router_logits"].reshape(40, 2))
    kept = np.asarray(route_capacity(probs, out["router_logits"].reshape(40, 2), 2, 10, None).kept)[
        np.asarray(valid).reshape(-1)
    ]
    assert 0 < kept.mean() < 1
    close(out["dropped"], 1 - kept.mean())


def test_dropless_balance_loss_ignores_padding():
    moe = MoeConfig(num_experts=3)
    params = params_of(MoeMlp(llm_config(), moe, LoraConfig(), nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 30, 16))
    padded = run(make(moe), params, x, valid_BxL=jnp.arange(30)[None] < 19)[1]["aux_loss"]
    close(padded, run(make(moe), params, x[:, :19])[1]["aux_loss"], 1e-6)


def test_bfloat16_keeps_the_router_in_float32():
    moe = MoeConfig(num_experts=2)
    params = params_of(MoeMlp(llm_config(), moe, LoraConfig(), nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(0), (1, 40, 16)).astype(jnp.bfloat16)
    y, out = run(make(moe), params, x)
    assert y.dtype == jnp.bfloat16 and out["router_logits"].dtype == jnp.float32
    close(out["router_logits"][0], x[0].astype(jnp.float32) @ params["router"]["kernel"], 1e-6)
    close(y.astype(jnp.float32), run(make(moe), params, x.astype(jnp.float32))[0], 2e-2)


def test_all_choices_dropped_give_zero():
    experts = MoeMlp(llm_config(), MoeConfig(num_experts=2), LoraConfig(), nnx.Rngs(0)).experts
    x = jnp.ones((40, 16))
    none = Routing(jnp.zeros((40, 1), int), jnp.zeros((40, 1)), jnp.zeros((40, 1), bool))
    assert not np.asarray(experts(x, none, None)).any()


def ragged_all_to_all(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` is documented to do; itself it runs on TPUs only."""
    del recv_sizes
    me, row = jax.lax.axis_index(axis_name), jnp.arange(len(output))
    everyone = [jax.lax.all_gather(x, axis_name) for x in (operand, input_offsets, send_sizes, output_offsets)]
    for rows, begin, size, target in zip(*everyone, strict=True):
        inside = (row >= target[me]) & (row < target[me] + size[me])
        output = jnp.where(inside[:, None], rows[(row - target[me] + begin[me]).clip(0, len(rows) - 1)], output)
    return output


@pytest.mark.parametrize(
    ("sizes", "transport"),
    [
        ({"expert": 2, "fsdp": 2, "tensor": 2}, "padded"),
        ({"expert": 2, "fsdp": 2, "tensor": 2}, "ragged"),
        ({"data": 2, "expert": 4}, "ragged"),
        ({"data": 8}, "none"),
    ],
)
def test_every_mesh_gives_the_same_value_and_gradient(sizes, transport, monkeypatch):
    if transport == "ragged":
        monkeypatch.setattr(expert_exchange, "is_for_tpu", lambda x: True)
        monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_all_to_all)
    mesh = make_mesh(MeshConfig(**({"data": 1, "fsdp": 1, "expert": 1, "tensor": 1} | sizes)))
    moe, lora = MoeConfig(num_experts=4, top_k=2), LoraConfig(rank=2, targets=("gate", "down"))
    module = make(moe, lora, rules=ShardingConfig())
    params = with_adapters(params_of(MoeMlp(llm_config(), moe, lora, nnx.Rngs(0))))
    x = jax.random.normal(jax.random.key(0), (8, 20, 16))

    @jax.jit
    def objective(params, x):
        def loss(params, x):
            y, out = run(module, params, x)
            return jnp.sum(jnp.sin(y)) + out["aux_loss"], y

        return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)

    sharded = (
        jax.device_put(params, param_shardings(logical_axes(module), params, ShardingConfig(), mesh)),
        jax.device_put(x, batch_sharding(mesh)),
    )
    program = str(jax.make_jaxpr(objective)(*sharded))
    assert "psum" in program and ("all_to_all" in program) == (mesh.shape["expert"] > 1 and transport == "padded")
    jax.tree.map(lambda a, b: close(a, b), objective(*sharded), objective(params, x))


def test_sort_by_expert_is_stable():
    expert = np.random.default_rng(0).integers(0, 4, 57)  # 3: no expert
    order, inverse, member = sort_by_expert(jnp.asarray(expert), 3)
    np.testing.assert_array_equal(order, np.argsort(expert, stable=True))
    np.testing.assert_array_equal(np.asarray(order)[np.asarray(inverse)], np.arange(57))
    np.testing.assert_array_equal(member, np.sort(expert)[:, None] == np.arange(3))
