"""Where the router sends text, image, region and <SEG> tokens, layer by layer, over all pictures and by modality."""

from collections.abc import Sequence

import numpy as np

from medplib_jax.config.model import ModelConfig
from medplib_jax.decode.token_kinds import TOKEN_KINDS
from medplib_jax.evaluate.evaluators.predictions import PredictionRow


def summarise(rows: Sequence[PredictionRow], config: ModelConfig) -> dict:
    """Sums the counts [MoE layers, token kinds, E] under "router" of each row; kinds that never occurred are left out.

    {"layers": decoder layer of each MoE layer, "share": kind -> fractions [MoE layers, E] that sum to 1, "tokens": kind
    -> how many, "modalities": modality -> {"share", "tokens"}}
    """
    modalities = sorted({row["modality"] for row in rows})
    each = {name: _shares([row["router"] for row in rows if row["modality"] == name], config) for name in modalities}
    return {"layers": list(config.moe_layers)} | _shares([row["router"] for row in rows], config) | {"modalities": each}


def _shares(counts: Sequence[list], config: ModelConfig) -> dict:
    total = np.sum(counts, axis=0)
    tokens = {kind: int(total[0, i].sum()) // config.moe.top_k for i, kind in enumerate(TOKEN_KINDS)}
    seen = {kind: total[:, i] for i, kind in enumerate(TOKEN_KINDS) if tokens[kind]}
    return {
        "share": {kind: (part / part.sum(-1, keepdims=True)).tolist() for kind, part in seen.items()},
        "tokens": {kind: tokens[kind] for kind in seen},
    }
