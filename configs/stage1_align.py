"""Stage I: align. Teaches the language model to read image features.

COMMAND
    python -m medplib_jax.train --config=configs/stage1_align.py:7b --workdir=runs/7b/stage1

7b: from LLaVA-1.5-7B; only the projector trains, on 500k image descriptions (LLaVA-Med's alignment set, written by
`python -m medplib_jax.datasets.import_dataset --dataset llava_med_alignment --source FOLDER --out
data/llava_med_alignment`). Batch 128, 1 epoch, lr 1e-3. tiny: nothing is pretrained, so CLIP, projector and language
model all train, on reports that say of every name of the modality whether it is there.
"""

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, InitConfig, LossConfig, OptimConfig, TrainConfig

from . import common


def get_config(size: str = "7b"):
    return to_config_dict(common.choose(size, **{"7b": large, "tiny": tiny})())


def large() -> ExperimentConfig:
    data = DataConfig(
        sources=("data/llava_med_alignment/llava_med_alignment_train.json",),
        root="data/llava_med_alignment",
        tokenizer="checkpoints/llava-v1.5-7b/tokenizer",
        bucket_lengths=common.BUCKETS_2048,
        max_regions=0,
        max_masks=0,
        on_error="skip",
        workers=8,
    )
    return ExperimentConfig(
        model=common.LARGE,
        data=data,
        optim=OptimConfig(lr=1e-3, trainable=(common.PROJECTOR,), frozen_dtype="bfloat16"),
        loss=LossConfig(ce_chunk=common.CE_CHUNK),
        mesh=common.POD,
        init=InitConfig(stage=1, base="checkpoints/llava-v1.5-7b"),
        train=TrainConfig(epochs=1),
    )


def tiny() -> ExperimentConfig:
    return ExperimentConfig(
        model=common.TINY,
        data=common.phantom(common.ALIGN, bucket_lengths=(136,), max_regions=0, max_masks=0),
        optim=common.tiny_optim(1e-3, common.CLIP, common.PROJECTOR, common.LLM),
        init=InitConfig(stage=1),
        train=TrainConfig(steps=1600, checkpoint_every=400),
    )
