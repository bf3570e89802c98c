import itertools
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.batch import combine, flatten, unflatten
from medplib_jax.config.experiment import OptimConfig
from medplib_jax.train.optim import lr_factors, make_optimizer, make_schedule, partition, warmup_steps
from tests.paths import GOLDEN

schedules = json.loads((GOLDEN / "schedules.json").read_text())
params = {
    "llm": {"head": {"kernel": 1.0}, "layers": {"q": {"kernel": 2.0, "lora_a": 3.0}}},
    "sam": {"blocks": {"0": {"bias": 4.0}}},
}


@pytest.mark.parametrize("name", schedules)
def test_reference_schedule_equals_the_original(name):
    total, warm = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
    epoch = 1000  # a share that gives `warm` steps, rounded like the original's int(0.01 * steps)
    schedule = make_schedule(OptimConfig(lr=3e-4, schedule="reference", warmup=(warm + 0.5) / epoch), total, epoch)
    rates = [float(schedule(step)) for step in range(len(schedules[name]))]
    np.testing.assert_allclose(rates, schedules[name], atol=1e-4 * 3e-4)


def test_exact_schedule_rises_from_zero_and_falls_to_zero():
    schedule = make_schedule(OptimConfig(lr=1.0, warmup=0.1), total_steps=20, epoch_steps=40)
    rates = [float(schedule(step)) for step in range(21)]
    np.testing.assert_allclose(rates[:5], [0, 0.25, 0.5, 0.75, 1.0])
    assert rates[20] == 0 and all(a > b for a, b in itertools.pairwise(rates[4:]))


def test_warmup_is_a_share_of_one_epoch_and_at_least_two_steps():
    assert warmup_steps(OptimConfig(warmup=0.01), 1000) == 10
    assert warmup_steps(OptimConfig(warmup=0.01), 50) == 2


def test_partition_and_combine():
    trainable, frozen = partition(params, ("lora_[ab]$", "^sam/"))
    assert flatten(trainable) == {"llm/layers/q/lora_a": 3.0, "sam/blocks/0/bias": 4.0}
    assert set(flatten(frozen)) == {"llm/head/kernel", "llm/layers/q/kernel"}
    assert combine(trainable, frozen) == params
    with pytest.raises(ValueError, match="'lroa_a' matches no parameter"):
        partition(params, ("sam", "lroa_a"))
    with pytest.raises(ValueError, match="parameter llm/head/kernel is in both trees"):
        combine(params, {"llm": {"head": {"kernel": 0.0}}})


def test_a_constant_never_trains():
    tree = unflatten({"sam/prompt_encoder/position_gaussian": 1.0, "sam/prompt_encoder/no_mask": 2.0})
    trainable, frozen = partition(tree, ("^sam/",))
    assert set(flatten(trainable)) == {"sam/prompt_encoder/no_mask"}
    assert set(flatten(frozen)) == {"sam/prompt_encoder/position_gaussian"}


paths = st.lists(st.lists(st.sampled_from("abc"), min_size=3, max_size=3).map("/".join), min_size=1, unique=True)


@settings(max_examples=30)
@given(paths, st.sampled_from("abc"))
def test_partition_never_loses_a_leaf(names, letter):
    tree = unflatten({name: i for i, name in enumerate(names)})
    if not any(letter in name for name in names):
        return
    trainable, frozen = partition(tree, (letter,))
    assert combine(trainable, frozen) == tree
    assert all(letter in name for name in flatten(trainable)) and not any(letter in name for name in flatten(frozen))


def test_rate_factors_take_the_first_match():
    config = OptimConfig(lr_scale=(("sam", 0.1), (".*bias", 5.0), ("head", 2.0)))
    assert flatten(lr_factors(config, params)) == {
        "llm/head/kernel": 2.0,
        "llm/layers/q/kernel": 1.0,
        "llm/layers/q/lora_a": 1.0,
        "sam/blocks/0/bias": 0.1,
    }
    with pytest.raises(ValueError, match="optim.lr_scale pattern 'norm' matches no"):
        lr_factors(OptimConfig(lr_scale=(("norm", 0.1),)), params)


def test_updates_equal_torch():
    """AdamW with decay, clipping and a per-group rate against torch.optim, 6 steps with gradients that are clipped and
    not.
    """
    rng = np.random.default_rng(0)
    start = {"a": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=5).astype(np.float32)}
    gradients = [
        {k: (scale * rng.normal(size=v.shape)).astype(np.float32) for k, v in start.items()}
        for scale in (9, 0.1, 3, 0.01, 1, 7)
    ]
    config = OptimConfig(lr=1e-2, weight_decay=0.1, schedule="reference", warmup=0.03, lr_scale=(("^b", 0.5),))
    schedule = make_schedule(config, total_steps=12, epoch_steps=100)

    tx = make_optimizer(config, start)
    ours = {k: jnp.asarray(v) for k, v in start.items()}
    state = tx.init(ours)
    theirs = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in start.items()}
    groups = [{"params": [theirs["a"]]}, {"params": [theirs["b"]]}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step, gradient in enumerate(gradients):
        updates, state = tx.update(gradient, state, ours, rate=schedule(step))
        ours = optax.apply_updates(ours, updates)
        for group, factor in zip(optimizer.param_groups, (1.0, 0.5), strict=True):
            group["lr"] = float(schedule(step)) * factor
        for key, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[key])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        optimizer.step()
    for key in start:
        np.testing.assert_allclose(ours[key], theirs[key].detach().numpy(), atol=1e-5)
