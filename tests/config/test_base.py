"""Every field of every configuration is checked when it is given, and an error names the field."""

import dataclasses
import functools
import math
import typing

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medplib_jax.config.base import field_types, flags_parser, from_dict, unknown_field
from medplib_jax.config.experiment import ExperimentConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.config.sweep import SweepConfig, TaskConfig
from medplib_jax.models.layers import abstract_module, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.parallel.mesh import resolve
from medplib_jax.train.optim import make_schedule
from tests.helpers import tiny_experiment


def sections(config, path: tuple[str, ...] = ()):
    """(path, section) of a configuration and of all that are nested in it."""
    yield path, config
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            yield from sections(value, (*path, field.name))


def plain(kind):
    """The type without its bounds."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is typing.Annotated else kind


def numeric_fields(config):
    """(path of the section, section, field) of every field that holds a number."""
    return [
        (path, section, name)
        for path, section in sections(config)
        for name, kind in field_types(type(section)).items()
        if plain(kind) in (int, float)
    ]


TINY = tiny_experiment()
NUMERIC = [(TINY, *found) for found in numeric_fields(TINY)]
NUMERIC += [(SweepConfig(), *found) for found in numeric_fields(SweepConfig())]


def replaced(config, path: tuple[str, ...], section):
    """The configuration with another section at the path."""
    for name in reversed(path):
        parent = functools.reduce(getattr, path[: path.index(name)], config)
        section = dataclasses.replace(parent, **{name: section})
    return section


@functools.cache
def sizes(model: ModelConfig) -> list[int]:
    return [leaf.size for leaf in jax.tree.leaves(params_of(abstract_module(lambda rngs: MedPLIB(model, rngs))))]


def use(config) -> None:
    """What a run computes from numbers before it compiles."""
    if isinstance(config, ExperimentConfig):
        assert all(sizes(config.model)), "parameters without a value"
        make_schedule(config.optim, config.train.steps or 10, 5)(3)
        resolve(config.mesh, 8)


@settings(max_examples=150)
@given(st.sampled_from(NUMERIC), st.sampled_from([0, -1, math.nan, math.inf, 0.5, "1", None]))
def test_a_number_is_accepted_or_refused_by_name(found, value):
    config, path, section, name = found
    try:
        changed = dataclasses.replace(section, **{name: value})
        changed = replaced(config, path, changed)
    except ValueError as error:
        assert name in str(error) or getattr(section, "NAME", "") in str(error), error
        return
    assert isinstance(value, int | float) and math.isfinite(value)
    use(changed)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train.steps", -5, "train.steps -5 must be at least 0"),
        ("train.epochs", 0, "train.epochs 0 must be above 0"),
        ("optim.b2", 1.0, "optim.b2 1.0 must be at least 0 and below 1"),
        ("optim.lr", math.nan, "optim.lr nan is not a finite number"),
        ("data.workers", 1.5, "data.workers 1.5 is not a whole number"),
        ("data.bucket_lengths", [0, 8], "data.bucket_lengths 0 must be above 0"),
        ("data.on_error", "ignore", "data.on_error 'ignore' is not one of 'raise', 'skip'"),
        ("model.remat", "some", "model.remat 'some' is not one of 'none', 'full'"),
        ("model.mask.decoder_heads", 3, "half of mask.out_dim 16 is not divisible by mask.decoder_heads 3"),
        ("init.base", 7, "init.base 7 is not a string"),
    ],
)
def test_the_message_says_what_a_field_may_be(field, value, message):
    *path, name = field.split(".")
    section = functools.reduce(getattr, path, TINY)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(section, **{name: value})


def test_lists_become_tuples():
    assert TINY.data.bucket_lengths == dataclasses.replace(TINY.data, bucket_lengths=[16]).bucket_lengths
    assert SweepConfig(tasks=[{"name": "a", "file": "b"}]).tasks == (TaskConfig("a", "b"),)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("learning_rate", "did you mean optim.lr?"),
        ("optin.lr", "did you mean optim.lr?"),
        ("train.batch_size", "did you mean data.batch_size or eval.batch_size?"),
        ("train.num_epochs", "did you mean train.epochs?"),
        ("zzz", "known: model, data, optim, loss, mesh, sharding, init, train, eval"),
    ],
)
def test_an_unknown_field_is_told_from_the_nearest(name, nearest):
    assert unknown_field(ExperimentConfig, name) == f"unknown config field {name}; {nearest}"


def test_an_unknown_field_of_a_saved_experiment_names_its_section():
    with pytest.raises(ValueError, match=r"unknown config field llm\.heads; did you mean llm\.num_heads\?"):
        from_dict(ModelConfig, {"llm": {"heads": 3}})


def test_an_unknown_flag_is_one_line():
    with pytest.raises(SystemExit) as ended:
        flags_parser(ExperimentConfig)(
            ["train", "--config=configs/stage4_moe.py:tiny", "--config.optim.learning_rate=1"]
        )
    assert ended.value.code == "error: unknown config field optim.learning_rate; did you mean optim.lr?"
