"""What a token costs in a mixture of experts: one expert's FLOPs, whatever the number of experts.

The trip counts of the CPU's loops depend on where the tokens go, so no compiler can state their FLOPs: `executed_flops`
runs a program with a counter beside it that adds up every matrix product that really happens.
"""

import functools
import importlib.util
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from medplib_jax.aot.topologies import devices_of
from medplib_jax.config.experiment import MeshConfig
from medplib_jax.config.model import LlmConfig, LoraConfig, MoeConfig
from medplib_jax.models.language.moe import MoeMlp, SwiGlu
from medplib_jax.models.layers import abstract_module, bind, params_of
from medplib_jax.parallel.mesh import make_mesh


def test_counter_follows_loops_branches_and_scans():
    x, n = jnp.ones((4, 5)), 2 * 4 * 5 * 4

    def program(x, trips):
        y = jax.lax.fori_loop(0, trips, lambda i, y: y + x @ x.T, jnp.zeros((4, 4)))
        y, _ = jax.lax.scan(lambda y, _: (y + jax.jit(lambda x: x @ x.T)(x), None), y, length=5)
        return jax.lax.cond(trips > 2, lambda: y + x @ x.T, lambda: y)

    assert executed_flops(program, x, 3) == (3 + 5 + 1) * n
    assert executed_flops(program, x, 2) == (2 + 5) * n
    assert executed_flops(jax.grad(lambda x: jnp.sum(x @ x.T)), x) > 0


@pytest.mark.parametrize("num_experts", [pytest.param(2, marks=pytest.mark.slow), 8])
def test_top1_costs_one_expert(num_experts):
    for kind, ratio in flop_ratios(2048, 32, 48, num_experts).items():
        assert 1 <= ratio <= 1.3, (kind, ratio)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu (the extra tpu) is not installed")
@pytest.mark.parametrize("num_experts", [2, 8])
def test_top1_costs_one_expert_on_a_tpu(num_experts):
    """By the compiler's count, at MedPLIB-7B's sizes."""
    for kind, ratio in tpu_ratios("v5e:4x4", 8192, 4096, 11008, num_experts).items():
        assert ratio <= 1.05, (kind, ratio)


def executed_flops(function: Callable, *args) -> float:
    """Runs `function` on this machine with a counter beside it; returns the FLOPs of all matrix products that ran."""
    closed = jax.make_jaxpr(function)(*args)
    return float(jax.jit(lambda *leaves: _run(closed, *leaves)[1])(*jax.tree.leaves(args)))


def _run(closed, *args):
    """Evaluates a jaxpr; returns its outputs and the FLOPs executed."""
    jaxpr, total = closed.jaxpr, jnp.zeros(())
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *args), strict=True))

    def read(atom):
        return atom.val if hasattr(atom, "val") else values[atom]

    for eqn in jaxpr.eqns:
        outputs, flops = _run_equation(eqn, [read(atom) for atom in eqn.invars])
        values.update(zip(eqn.outvars, outputs, strict=True))
        total += flops
    return [read(atom) for atom in jaxpr.outvars], total


def _run_equation(eqn, inputs):
    name, params = eqn.primitive.name, eqn.params
    if name == "cond":
        return jax.lax.switch(
            inputs[0], [functools.partial(_run, branch) for branch in params["branches"]], *inputs[1:]
        )
    if name == "while":
        return _run_while(params, inputs)
    if name == "scan":
        return _run_scan(params, inputs)
    for key in ("jaxpr", "call_jaxpr"):
        if key in params:
            return _run(params[key], *inputs)
    flops = 0.0
    if name == "dot_general":
        (contracting, _), _ = params["dimension_numbers"]
        flops = 2.0 * eqn.outvars[0].aval.size * np.prod([inputs[0].shape[axis] for axis in contracting])
    outputs = eqn.primitive.bind(*inputs, **params)
    return outputs if eqn.primitive.multiple_results else [outputs], flops


def _run_while(params, inputs):
    cond_end, body_end = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]

    def body(state):
        carry, flops = _run(params["body_jaxpr"], *inputs[cond_end:body_end], *state[0])
        return carry, state[1] + flops

    def keep_going(state):
        return _run(params["cond_jaxpr"], *inputs[:cond_end], *state[0])[0][0]

    return jax.lax.while_loop(keep_going, body, (inputs[body_end:], jnp.zeros(())))


def _run_scan(params, inputs):
    consts_end, carry_end = params["num_consts"], params["num_consts"] + params["num_carry"]

    def body(state, xs):
        outputs, flops = _run(params["jaxpr"], *inputs[:consts_end], *state[0], *xs)
        return (outputs[: params["num_carry"]], state[1] + flops), outputs[params["num_carry"] :]

    state = inputs[consts_end:carry_end], jnp.zeros(())
    (carry, flops), ys = jax.lax.scan(
        body, state, inputs[carry_end:], length=params["length"], reverse=params["reverse"]
    )
    return [*carry, *ys], flops


def programs(tokens: int, width: int, mlp: int, num_experts: int) -> dict[str, tuple[Callable, dict]]:
    """{name: (function(params, x), abstract parameters)}:

    One MLP and a top-1 mixture, forward and with all gradients.
    """
    llm = LlmConfig(hidden_size=width, mlp_dim=mlp, num_layers=1, num_heads=1, num_kv_heads=1)
    valid = jnp.ones((1, tokens), bool)
    mlp_module = abstract_module(lambda rngs: SwiGlu(llm, LoraConfig(), rngs))
    moe_module = abstract_module(lambda rngs: MoeMlp(llm, MoeConfig(num_experts=num_experts), LoraConfig(), rngs))

    def one(params, x):
        return bind(mlp_module, params)(x)

    def mixture(params, x):
        return bind(moe_module, params)(x, valid)[0]

    return {
        "mlp forward": (one, params_of(mlp_module)),
        "moe forward": (mixture, params_of(moe_module)),
        "mlp gradient": (_gradient(one), params_of(mlp_module)),
        "moe gradient": (_gradient(mixture), params_of(moe_module)),
    }


def _gradient(function):
    return jax.grad(lambda params, x: jnp.sum(jnp.square(function(params, x).astype(jnp.float32))), argnums=(0, 1))


def example(abstract_params, tokens: int, width: int):
    """Random parameters and tokens [1, S, D]."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + len(jax.tree.leaves(abstract_params))))
    params = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape) / np.sqrt(p.shape[-2]), abstract_params)
    return params, jax.random.normal(next(keys), (1, tokens, width))


def flop_ratios(tokens: int, width: int, mlp: int, num_experts: int) -> dict[str, float]:
    """Executed FLOPs of the mixture over those of one expert's MLP on this machine, {"forward": .., "gradient": ..}."""
    counts = {
        name: executed_flops(function, *example(params, tokens, width))
        for name, (function, params) in programs(tokens, width, mlp, num_experts).items()
    }
    return {kind: counts[f"moe {kind}"] / counts[f"mlp {kind}"] for kind in ("forward", "gradient")}


def tpu_ratios(topology: str, tokens: int, width: int, mlp: int, num_experts: int) -> dict[str, float]:
    """FLOPs the TPU compiler counts for the mixture over one MLP's, bfloat16, one chip. Needs no TPU, only libtpu."""
    sharding = NamedSharding(
        make_mesh(MeshConfig(data=1, fsdp=1, expert=1, tensor=1), devices_of(topology)[:1]), PartitionSpec()
    )
    counts = {}
    for name, (function, params) in programs(tokens, width, mlp, num_experts).items():
        x = jax.ShapeDtypeStruct((1, tokens, width), jnp.bfloat16, sharding=sharding)
        params = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=sharding), params)
        counts[name] = jax.jit(function).lower(params, x).compile().cost_analysis()["flops"]
    return {kind: counts[f"moe {kind}"] / counts[f"mlp {kind}"] for kind in ("forward", "gradient")}
