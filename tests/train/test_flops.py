"""The FLOPs of a training step against arithmetic, and the table of chips against JAX's devices."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import pytest

from medplib_jax.aot.topologies import devices_of
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import LoraConfig, MoeConfig
from medplib_jax.train.flops import CHIPS as KINDS
from medplib_jax.train.flops import TPUS, chip_of_device, mfu, step_flops
from tests.helpers import random_batch, tiny_experiment
from tests.paths import ROOT

SMALLEST = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
CHIPS = 4  # of each of these topologies


def config(layers: int = 2, trainable=(".*",), **model) -> ExperimentConfig:
    """Text and pictures, no masks; no adapters and no experts."""
    base = tiny_experiment()
    llm = dataclasses.replace(base.model.llm, num_layers=layers)
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, llm=llm, moe=MoeConfig(), lora=LoraConfig(), **model),
        data=dataclasses.replace(base.data, max_masks=0),
        optim=dataclasses.replace(base.optim, trainable=trainable),
    )


def flops(config: ExperimentConfig) -> float:
    return step_flops(config, random_batch(config))


def test_a_layer_costs_two_flops_per_weight_and_position_forward_and_four_backward():
    """And twice two per score in attention; XLA's computes all of them, on a CPU."""
    llm, positions = config().model.llm, config().data.batch_size * 16
    weights = 4 * llm.hidden_size**2 + 3 * llm.hidden_size * llm.mlp_dim
    attention = 2 * 16 * llm.hidden_size
    assert flops(config(layers=3)) - flops(config(layers=2)) == 3 * 2 * positions * (weights + attention)


def test_frozen_weights_have_no_gradients_and_rematerialisation_does_not_count():
    head = flops(config(trainable=("^llm/head/",)))
    assert head < 0.6 * flops(config())
    again = config(trainable=("^llm/head/",), remat="full")
    assert flops(dataclasses.replace(again, loss=dataclasses.replace(again.loss, ce_chunk=4))) == head


def test_a_device_without_a_known_peak_has_no_mfu():
    assert mfu(1e12, 1.0) is None


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
@pytest.mark.parametrize("kind", TPUS)
def test_the_table_speaks_of_what_jax_calls_a_device(kind):
    """Number and memory of a topology's devices: a v4 chip is one of them, a TPU7x chip two."""
    devices = devices_of(SMALLEST[kind])
    chip = chip_of_device(devices[0])
    assert chip == TPUS[kind] and len(devices) == CHIPS * (2 if kind == "tpu7x" else 1)
    where = jax.sharding.SingleDeviceSharding(devices[0])
    too_large = jax.ShapeDtypeStruct((2**39,), jnp.float32, sharding=where)
    with pytest.raises(jax.errors.JaxRuntimeError, match="exceeds available HBM") as refusal:
        jax.jit(lambda x: x + 1, out_shardings=where).lower(too_large).compile()
    available = float(re.search(r"available HBM \(([\d.]+)G\)", str(refusal.value))[1]) * 2**30
    assert 0.95 < available / chip.hbm_bytes < 1.01


def test_the_readme_of_the_roofline_has_the_rates_of_the_chips():
    text = (ROOT / "medplib_jax/benchmarks/README.md").read_text()
    rows = re.findall(r"^\| (v\w+|H\d+) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| (\d+) \|$", text, re.M)
    assert len(rows) == 5
    for kind, *told in rows:
        chip = KINDS[kind.lower()]
        rates = (chip.flops / 1e12, chip.hbm_rate / 1e12, chip.ici_rate / 1e12, chip.flops / chip.hbm_rate)
        assert [float(number) for number in told] == pytest.approx(rates, rel=0.005), kind
