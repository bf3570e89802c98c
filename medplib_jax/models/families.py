"""The whole models by the family that a configuration names."""

from medplib_jax.config.experiment import ShardingConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.models.bird import Bird
from medplib_jax.models.layers import Rngs
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.whole import WholeModel

MODELS: dict[str, type[WholeModel]] = {"medplib": MedPLIB, "bird": Bird}


def build_model(
    config: ModelConfig,
    rngs: Rngs,
    rules: ShardingConfig | None = None,
    unstacked_layers: bool = False,
    unstacked_experts: bool = False,
) -> WholeModel:
    """The model of `config.family`; `unstacked_layers`, `unstacked_experts`: see `Llama`."""
    return MODELS[config.family](config, rngs, rules, unstacked_layers, unstacked_experts)
