"""What the stages share: model sizes, where data lies, and which parameters a pattern means."""

import logging
import os
import pathlib

from medplib_jax.config.experiment import DataConfig, MeshConfig, OptimConfig
from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, MaskConfig, ModelConfig, MoeConfig, RegionConfig
from medplib_jax.data.splits import annotation_files, is_held_out

log = logging.getLogger(__name__)

# MedPLIB-7B: the defaults of ModelConfig, in bfloat16. The backward pass keeps what the decoder computes as far as it
# is no wider than the model, and recomputes the rest.
LARGE = ModelConfig(dtype="bfloat16", remat="auto")

# Positions of a row whose logits exist at a time: enough to keep a TPU's matrix unit busy, 0.3 GB for two rows.
CE_CHUNK = 512

# Parameters and rows are spread over all chips: two experts of 7B do not fit one.
POD = MeshConfig(data=1, fsdp=-1)

# Everything a thousand times smaller; trains on a laptop from nothing. The vocabulary: 800 pieces and 267 added tokens.
TINY = ModelConfig(
    clip=ClipConfig(image_size=112, patch_size=14, hidden_size=96, num_layers=4, num_heads=4, mlp_dim=192),
    llm=LlmConfig(
        vocab_size=800 + 267, hidden_size=128, num_layers=3, num_heads=4, num_kv_heads=4, mlp_dim=256, max_positions=512
    ),
    mask=MaskConfig(
        image_size=128,
        patch_size=16,
        hidden_size=96,
        num_layers=4,
        num_heads=4,
        window_size=4,
        global_layers=(1, 3),
        out_dim=64,
        decoder_heads=4,
        decoder_mlp_dim=128,
        iou_head_dim=64,
    ),
    region=RegionConfig(max_points=64),
)

ALL_LINEAR = ("q", "k", "v", "o", "gate", "up", "down")
MLP_LINEAR = ("gate", "up", "down")
EXPERTS = MoeConfig(num_experts=2, top_k=1, capacity_factor=1.5)

# Where `bash launch/demo.sh` leaves data and models; the tiny stages begin there.
DEMO = "runs/demo"

# Patterns of parameter paths, see optim.trainable.
LORA = "lora_[ab]$"
HEAD_AND_EMBEDDINGS = ("^llm/head/", "^llm/embed/")
LAYER_NORMS = "^llm/layers/(input|post)_norm/"
PROJECTOR, REGION = "^projector/", "^region/"
CLIP, LLM, SAM = "^clip/", "^llm/", "^sam/"
MASK_DECODER, SEG_MLP = "^sam/mask_decoder/", "^seg_mlp/"
ROUTER = "^llm/moe/router/"
EXAMPLE_READERS = "^icl/"

# Lengths with 576 positions for the image: texts up to 2048 and up to 1024 tokens.
BUCKETS_2048, BUCKETS_1024 = (768, 1024, 1664, 2688), (768, 1024, 1664)

ALIGN, COMPLEX, REGIONS, GROUNDING = "align", "MeCoVQA-Complex", "MeCoVQA-Complex_local+Region", "MeCoVQA-Grounding"


def choose(size: str, **by_size):
    """by_size[size]; ValueError for a size that the config file does not have."""
    if size not in by_size:
        raise ValueError(f"unknown size {size!r} of this config; sizes: {', '.join(by_size)}")
    return by_size[size]


def lora(rank: int, targets: tuple[str, ...]) -> LoraConfig:
    return LoraConfig(rank=rank, alpha=16.0, dropout=0.05, targets=targets)


def tiny_lora(targets: tuple[str, ...]) -> LoraConfig:
    """No dropout: a run this short does not overfit, and drawing the masks takes a quarter of the step on a CPU."""
    return LoraConfig(rank=16, alpha=16.0, dropout=0.0, targets=targets)


def tiny_optim(lr: float, *trainable: str) -> OptimConfig:
    """Adapters start at zero and learn at twice the rate; a longer memory of squared gradients suits the small
    batch.
    """
    adapters = ((LORA, 2.0),) if LORA in trainable else ()
    return OptimConfig(lr=lr, b2=0.98, warmup=0.1, trainable=trainable, lr_scale=adapters)


# What `python -m medplib_jax.datasets.assemble --annotations MeCoVQA --images SA-Med2D-20M --out data/assembled` makes.
ASSEMBLED = "assembled/mecovqa"


def assembled(name: str, split: str, data: str = "data") -> str:
    """One split of a part of the assembled MeCoVQA (complex, region, grounding, zeroshot), as a source."""
    return f"{data}/{ASSEMBLED}/{name}/1.0.0#{split}"


def mecovqa(*names: str, **settings) -> DataConfig:
    """Training splits of the assembled MeCoVQA, with the tokenizer of the converted LLaVA-1.5-7B."""
    return DataConfig(
        sources=tuple(assembled(name, "train") for name in names),
        tokenizer="checkpoints/llava-v1.5-7b/tokenizer",
        batch_size=128,
        on_error="skip",
        workers=8,
        **settings,
    )


def own_sources(folder: str) -> tuple[tuple[str, ...], str]:
    """(sources, root) of a user's data: FOLDER#SPLIT of an assembled dataset, or a folder's annotation files for
    training.

    These are the folder's own, or those in its train/ when it has none. ValueError without any. No folder has none: its
    experiment can be compiled, not run.
    """
    if not folder:
        return (), ""
    if "#" in folder and not pathlib.Path(folder).is_dir():
        return (folder,), ""
    root = pathlib.Path(folder)
    sources = _for_training(root) or _for_training(root / "train")
    if not sources:
        raise ValueError(f"{root}: expected annotation files *.json in it or in its train/, found none")
    return tuple(sources), str(root)


def _for_training(folder: pathlib.Path) -> list[str]:
    files, others = annotation_files(str(folder))
    for other in others:
        log.warning("%s is not a list of records and is left out", other)
    return [file for file in files if not is_held_out(os.path.basename(file))]


def phantom(*names: str, **settings) -> DataConfig:
    """The dataset that `bash launch/demo.sh` generates, with the tokenizer trained on it."""
    return DataConfig(
        sources=tuple(f"{DEMO}/phantom/train/{name}.json" for name in names),
        root=f"{DEMO}/phantom",
        tokenizer=f"{DEMO}/tokenizer",
        batch_size=8,
        mask_canvas=160,
        workers=0,
        **settings,
    )
