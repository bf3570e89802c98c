"""Where the router sends text, image, region and <SEG> tokens, layer by layer (the original's model/eval/vis_gate.py, with more kinds)."""

import functools
from collections.abc import Sequence

import jax
import numpy as np

from medplib_jax.config import ModelConfig
from medplib_jax.decode import Generation
from medplib_jax.models.layers import abstract_module, bind
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.types import Batch, Params

TOKEN_KINDS = ("text", "image", "region", "SEG")


class RouterProbe:
    """Which experts a model with MoE layers chooses for prompts and their generated answers. Compiles once per batch shape."""

    def __init__(self, config: ModelConfig, params: Params, *, seg_id: int):
        self.config, self.params, self.seg_id = config, params, seg_id
        model = abstract_module(functools.partial(MedPLIB, config))
        self._expert_index = jax.jit(lambda params, batch: bind(model, params)(batch)[1]["expert_index"])

    def __call__(self, prompts: Batch, generation: Generation) -> list:
        """Per row, counts as nested lists [MoE layers, token kinds, E]: one more forward pass, over prompts with their answers.

        Every one of a token's top-k choices counts.
        """
        batch = append_answers(prompts, generation)
        kinds_BxL = token_kinds(batch, prompts.clip_pixels.shape[1] * self.config.clip.num_patches, self.seg_id)
        expert_index = np.asarray(self._expert_index(self.params, batch))
        return count_choices(expert_index, kinds_BxL, self.config.moe.num_experts).tolist()


def summarise(counts: Sequence[list], config: ModelConfig) -> dict:
    """Sums the rows of `RouterProbe`; kinds that never occurred are left out.

    {"layers": decoder layer of each MoE layer, "share": kind -> fractions [MoE layers, E] that sum to 1, "tokens": kind -> how many}
    """
    total = np.sum(counts, axis=0)
    tokens = {kind: int(total[0, i].sum()) // config.moe.top_k for i, kind in enumerate(TOKEN_KINDS)}
    seen = {kind: total[:, i] for i, kind in enumerate(TOKEN_KINDS) if tokens[kind]}
    return {
        "layers": list(config.moe_layers),
        "share": {kind: (part / part.sum(-1, keepdims=True)).tolist() for kind, part in seen.items()},
        "tokens": {kind: tokens[kind] for kind in seen},
    }


def append_answers(prompts: Batch, generation: Generation) -> Batch:
    """The prompts [B, L] with each row's generated tokens behind its last valid position: [B, L + T]. No mask slots."""
    answers_BxT, lengths_B = np.asarray(generation.tokens), np.asarray(generation.lengths)
    valid_BxL = np.asarray(prompts.valid)
    B, L = valid_BxL.shape
    offset_BxS = np.arange(L + answers_BxT.shape[1]) - valid_BxL.sum(-1, keepdims=True)  # place in the answer, negative in the prompt
    answered_BxS = (offset_BxS >= 0) & (offset_BxS < lengths_B[:, None])
    answer_BxS = np.take_along_axis(answers_BxT, np.clip(offset_BxS, 0, answers_BxT.shape[1] - 1), axis=1)

    def widen(values_BxL, fill):
        return np.pad(np.asarray(values_BxL), ((0, 0), (0, answers_BxT.shape[1])), constant_values=fill)

    return prompts.replace(
        tokens=np.where(answered_BxS, answer_BxS, widen(prompts.tokens, 0)).astype(np.int32),
        valid=widen(prompts.valid, False) | answered_BxS,
        targets=widen(prompts.targets, 0),
        loss_weights=widen(prompts.loss_weights, 0),
        feature_index=widen(prompts.feature_index, -1),
        seg_position=np.zeros((B, 0), np.int32),
        mask_valid=np.zeros((B, 0), bool),
        gt_masks=np.zeros((B, 0, *prompts.gt_masks.shape[2:]), np.uint8),
    )


def token_kinds(batch: Batch, num_image_features: int, seg_id: int) -> np.ndarray:
    """int [B, L]: index into TOKEN_KINDS, -1 at padding. Features below `num_image_features` are patches, the others regions."""
    feature_BxL = np.asarray(batch.feature_index)
    is_kind = (~np.asarray(batch.valid), feature_BxL >= num_image_features, feature_BxL >= 0, np.asarray(batch.tokens) == seg_id)
    return np.select(is_kind, (-1, *map(TOKEN_KINDS.index, ("region", "image", "SEG"))), TOKEN_KINDS.index("text"))


def count_choices(expert_index: np.ndarray, kinds_BxL: np.ndarray, num_experts: int) -> np.ndarray:
    """How often each expert was chosen: expert_index int [n, B, L, k] -> int64 [B, n, kinds, E]."""
    is_kind = (kinds_BxL[..., None] == np.arange(len(TOKEN_KINDS))).astype(np.int64)
    is_chosen = (expert_index[..., None] == np.arange(num_experts)).sum(-2)
    return np.einsum("blt,nble->bnte", is_kind, is_chosen)
