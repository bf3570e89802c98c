"""Stage II: the visual-language expert. Learns medical questions, also about regions.

COMMAND
    python -m medplib_jax.train --config=configs/stage2_vqa.py:7b --workdir=runs/7b/stage2

7b: from stage I; LoRA (rank 16) on every linear layer of the decoder, head, embeddings, both layer norms and
projector train on MeCoVQA's complex and region questions. Batch 128, 3 epochs, lr 1e-4. The region adapter trains
too: the published stage II left it random although its data has regions. tiny: also the rest of the language model,
which is as new to questions as to their answers.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import ExperimentConfig, InitConfig, LossConfig, OptimConfig, TrainConfig

from . import common

TRAINABLE = (common.LORA, *common.HEAD_AND_EMBEDDINGS, common.LAYER_NORMS, common.PROJECTOR, common.REGION)


def get_config(size: str = "7b"):
    return to_config_dict(common.choose(size, **{"7b": large, "tiny": tiny})())


def large() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.LARGE, lora=common.lora(16, common.ALL_LINEAR)),
        data=common.mecovqa("complex", "region", bucket_lengths=common.BUCKETS_2048, max_regions=4, max_masks=0),
        optim=OptimConfig(lr=1e-4, trainable=TRAINABLE, frozen_dtype="bfloat16"),
        loss=LossConfig(ce_chunk=common.CE_CHUNK),
        mesh=common.POD,
        init=InitConfig(stage=2, base="runs/7b/stage1"),
        train=TrainConfig(epochs=3),
    )


def tiny() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(common.TINY, lora=common.tiny_lora(common.ALL_LINEAR)),
        data=common.phantom(common.COMPLEX, common.REGIONS, bucket_lengths=(168, 216), max_regions=4, max_masks=0),
        optim=common.tiny_optim(1e-3, *TRAINABLE, common.LLM),
        init=InitConfig(stage=2, base=f"{common.DEMO}/stage_I"),
        train=TrainConfig(steps=850, checkpoint_every=200),
    )
