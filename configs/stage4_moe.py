"""Stage IV: the mixture of experts. One model that answers in words and in masks.

COMMAND
    python -m medplib_jax.train --config=configs/stage4_moe.py:7b --workdir=runs/7b/stage4

7b: expert 0 is stage III's MLP, expert 1 stage II's, in all 32 layers; the router is new. SEG MLP and mask head come
from III, all else from II. LoRA (rank 8) on both experts, q and v, the router, head, embeddings, mask decoder, SEG
MLP and region adapter train on all of MeCoVQA. Batch 128, 3 epochs (the released weights: 2), lr 3e-4.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import ExperimentConfig, InitConfig, LossConfig, OptimConfig, TrainConfig

from . import common

TRAINABLE = (
    common.LORA,
    common.ROUTER,
    *common.HEAD_AND_EMBEDDINGS,
    common.MASK_DECODER,
    common.SEG_MLP,
    common.REGION,
)
TARGETS = (*common.MLP_LINEAR, "q", "v")
LOSS = LossConfig(ce=1.0, dice=0.5, bce=2.0, focal=0.0, iou=0.0)


def get_config(size: str = "7b"):
    return to_config_dict(common.choose(size, **{"7b": large, "tiny": tiny})())


def large() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.LARGE, moe=common.EXPERTS, lora=common.lora(8, TARGETS)),
        data=common.mecovqa(
            "complex", "region", "grounding", bucket_lengths=common.BUCKETS_1024, max_regions=4, max_masks=1
        ),
        optim=OptimConfig(lr=3e-4, trainable=TRAINABLE, frozen_dtype="bfloat16"),
        loss=dataclasses.replace(LOSS, ce_chunk=common.CE_CHUNK),
        mesh=common.POD,
        init=InitConfig(stage=4, base="runs/7b/stage2", grounding="runs/7b/stage3"),
        train=TrainConfig(epochs=3),
    )


def tiny() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.TINY, moe=common.EXPERTS, lora=common.tiny_lora(TARGETS)),
        data=common.phantom(
            common.COMPLEX, common.REGIONS, common.GROUNDING, bucket_lengths=(216,), max_regions=4, max_masks=4
        ),
        optim=common.tiny_optim(1.3e-3, *TRAINABLE),
        loss=LOSS,
        init=InitConfig(stage=4, base=f"{common.DEMO}/stage_II", grounding=f"{common.DEMO}/stage_III"),
        train=TrainConfig(steps=400, checkpoint_every=200),
    )
