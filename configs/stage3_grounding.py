"""Stage III: the pixel-grounding expert. Learns to answer with masks.

COMMAND
    python -m medplib_jax.train --config=configs/stage3_grounding.py:7b --workdir=runs/7b/stage3

7b: from stage II with its LoRA merged; a new LoRA (rank 8) on the decoder's MLPs, SAM-Med2D's mask decoder and the
SEG MLP train on MeCoVQA's grounding set. Batch 128, 10 epochs, lr 3e-4. Stage IV takes this stage's MLPs as expert 0.
tiny: the whole of SAM trains, because nothing is pretrained, and embeddings and head, because <SEG> is new to them.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import ExperimentConfig, InitConfig, LossConfig, OptimConfig, TrainConfig

from . import common

LOSS = LossConfig(ce=1.0, dice=5.0, bce=1.0, focal=1.0, iou=0.0)


def get_config(size: str = "7b"):
    return to_config_dict(common.choose(size, **{"7b": large, "tiny": tiny})())


def large() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.LARGE, lora=common.lora(8, common.MLP_LINEAR)),
        data=common.mecovqa("grounding", bucket_lengths=common.BUCKETS_2048, max_regions=0, max_masks=1),
        optim=OptimConfig(
            lr=3e-4, trainable=(common.LORA, common.MASK_DECODER, common.SEG_MLP), frozen_dtype="bfloat16"
        ),
        loss=dataclasses.replace(LOSS, ce_chunk=common.CE_CHUNK),
        mesh=common.POD,
        init=InitConfig(stage=3, base="runs/7b/stage2"),
        train=TrainConfig(epochs=10),
    )


def tiny() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.TINY, lora=common.tiny_lora(common.MLP_LINEAR)),
        data=common.phantom(common.GROUNDING, bucket_lengths=(184,), max_regions=0, max_masks=4),
        optim=common.tiny_optim(1e-3, common.LORA, *common.HEAD_AND_EMBEDDINGS, common.SAM, common.SEG_MLP),
        loss=LOSS,
        init=InitConfig(stage=3, base=f"{common.DEMO}/stage_II"),
        train=TrainConfig(steps=600, checkpoint_every=200),
    )
