"""Foreign weights brought together: the tensors of several folders and files under the table's names, and what they
are.

An adapter whose place the model does not have (on lm_head, CLIP or the projector) is added into its weight.
"""

import dataclasses
import functools
import logging
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from medplib_jax.config.model import ModelConfig

from . import foreign_config, kinds, mapping, torch_files
from .foreign_config import Foreign
from .torch_files import Tensor

log = logging.getLogger(__name__)

QWEN_EMBEDDING = "transformer.wte.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|g_idx|SCB|weight_scale|weight_format|absmax|quant_map|quant_state\..*)$"
)
_WITH_PLACE = re.compile(
    r"^model\.layers\.\d+\..*(?:[qkvo]|gate|up|down)_proj\.$"
    r"|^transformer\.h\.\d+\.(?:attn\.c_attn|attn\.c_proj|mlp\.w1|mlp\.w2|mlp\.c_proj)\.$"
)


@dataclasses.dataclass(frozen=True)
class Source:
    """Weights that are found but not read. `tensors` have canonical names; `folders` may hold the tokenizer."""

    tensors: dict[str, Tensor]
    foreign: Foreign
    config: ModelConfig
    folders: tuple[pathlib.Path, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: tensor.shape for key, tensor in self.tensors.items()}


def read_source(
    sources: Sequence[pathlib.Path],
    config: pathlib.Path | None = None,
    lora_alpha: float | None = None,
    ignored_keys: Collection[str] = (),
) -> Source:
    """All of the sources as one model; `config` is a folder with config.json that counts before theirs.

    FileNotFoundError for missing files; ValueError for files that are damaged, quantised, or contradict each other.
    """
    beside = (source if source.is_dir() else source.parent for source in sources)
    folders = tuple(folder for folder in (config, *beside) if folder)
    tensors = read_tensors(sources)
    foreign = foreign_config.read_foreign(folders, ignored_keys)
    tensors = _tied(tensors, foreign)
    if any(".lora_A." in key for key in tensors) and not {EMBEDDING, QWEN_EMBEDDING} & tensors.keys():
        base = foreign.adapter.get("base_model_name_or_path") or "the model that they were trained on"
        raise ValueError(f"the sources hold adapters without their base; add --source with {base}")
    found = kinds.detect_config(_with_place(tensors), foreign, lora_alpha)
    return Source(_merged(tensors, foreign, lora_alpha), foreign, found, folders)


def read_tensors(sources: Sequence[pathlib.Path]) -> dict[str, Tensor]:
    """Canonical name -> tensor of all sources; the first that has a name counts."""
    merged: dict[str, Tensor] = {}
    for source in sources:
        if not source.exists():
            raise FileNotFoundError(f"--source {source}: no such file or folder")
        named = _canonical(torch_files.read_folder(source))
        repeated = named.keys() & merged.keys()
        if repeated:
            log.info("%s: %d tensors are taken from an earlier source, first %s", source, len(repeated), min(repeated))
        merged = named | merged
    return merged


def _canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = mapping.canonical(key)
        if _QUANTISED.search(key) or (tensor.dtype.kind in "iu" and key.endswith(".weight")):
            raise ValueError(
                f"{tensor.file}: {key!r} belongs to quantised weights (GPTQ, AWQ or bitsandbytes), which are not "
                "converted; take the model's original weights in fp32, bf16 or fp16"
            )
        if name in named and not torch_files.equal(named[name], tensor):
            raise ValueError(
                f"{tensor.file}: {key!r} is one tensor under two names; the other, with other values, is in "
                f"{named[name].file}"
            )
        named.setdefault(name, tensor)
    return named


def _tied(tensors: dict[str, Tensor], foreign: Foreign) -> dict[str, Tensor]:
    """With `tie_word_embeddings` the embedding is the head, too; here each has a parameter of its own."""
    if not foreign.language.get("tie_word_embeddings") or EMBEDDING not in tensors:
        return tensors
    if HEAD in tensors and not torch_files.equal(tensors[HEAD], tensors[EMBEDDING]):
        raise ValueError(
            f"{tensors[HEAD].file}: {HEAD} differs from {EMBEDDING}, although config.json says tie_word_embeddings"
        )
    return tensors | {HEAD: tensors[EMBEDDING]}


def _stem(key: str) -> str:
    """Of an adapter's tensor: the module that it adapts, with a dot at the end."""
    return re.sub(r"lora_[AB]\.weight$", "", key)


def _without_place(key: str) -> bool:
    return ".lora_" in key and not _WITH_PLACE.match(_stem(key))


def _with_place(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tensor.shape for key, tensor in tensors.items() if not _without_place(key)}


def _merged(tensors: dict[str, Tensor], foreign: Foreign, lora_alpha: float | None) -> dict[str, Tensor]:
    """The tensors with every adapter that has no place of its own added into its weight."""
    merged = {key: tensor for key, tensor in tensors.items() if not _without_place(key)}
    for stem in sorted({_stem(key) for key in tensors.keys() - merged.keys()}):
        weight, low, high = (tensors.get(stem + name) for name in ("weight", "lora_A.weight", "lora_B.weight"))
        if None in (weight, low, high):
            raise ValueError(f"{stem}: an adapter needs weight, lora_A and lora_B, of which one is missing")
        log.info("%sweight: its adapter is added into it, since the model has no place for one there", stem)
        rank = low.shape[0]
        scale = kinds.adapters_alpha(rank, foreign, lora_alpha) / rank
        merged[stem + "weight"] = dataclasses.replace(weight, read=functools.partial(_sum, weight, low, high, scale))
    return merged


def _sum(weight: Tensor, low: Tensor, high: Tensor, scale: float) -> np.ndarray:
    a, b = low.read().astype(np.float32), high.read().astype(np.float32)
    return (weight.read().astype(np.float32) + scale * (b @ a)).astype(weight.dtype)
