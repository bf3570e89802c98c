"""Stage V: in-context segmentation. Examples, pictures with their masks, say what to draw (MedPLIB-ICL, TPAMI 2026).

COMMAND
    python -m medplib_jax.datasets.icl --pairs data/pairs --out data/icl
    python -m medplib_jax.train --config=configs/stage5_icl.py:7b --workdir=runs/7b/stage5

7b: from stage IV with its LoRA merged; a new LoRA (rank 8) on the experts, SAM-Med2D's mask decoder, the SEG MLP, the
token compressor (576 to 256 positions a picture) and the mask encoder (64 positions a mask) train on up to three
examples before each picture. Batch 16, 10 epochs, lr 3e-4.
tiny: from stage IV of `bash launch/demo.sh --icl`, on the shapes that it makes.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import (
    DataConfig,
    ExperimentConfig,
    InitConfig,
    LossConfig,
    MeshConfig,
    OptimConfig,
    TrainConfig,
)
from medplib_jax.config.model import IclConfig
from medplib_jax.datasets.phantom.shapes import SIDE

from . import common

TRAINABLE = (common.LORA, common.MASK_DECODER, common.SEG_MLP)
LOSS = LossConfig(ce=1.0, dice=5.0, bce=1.0, focal=1.0, iou=0.0)
PICTURES = 4  # three examples and the picture in question

# Still smaller than the other tiny stages: 16 positions a picture. Masks of examples are pictures of their own.
TINY = dataclasses.replace(
    common.TINY,
    clip=dataclasses.replace(common.TINY.clip, patch_size=SIDE // 4),
    mask=dataclasses.replace(
        common.TINY.mask, image_size=SIDE, patch_size=SIDE // 8, num_layers=2, global_layers=(0, 1), adapter=False
    ),
    moe=common.EXPERTS,
    icl=IclConfig("separate"),
)


def get_config(size: str = "7b"):
    return to_config_dict(common.choose(size, **{"7b": large, "tiny": tiny})())


def large() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(
            common.LARGE,
            moe=common.EXPERTS,
            lora=common.lora(8, common.MLP_LINEAR),
            icl=IclConfig("separate", compressed_tokens=256, mask_tokens=64),
        ),
        data=DataConfig(
            sources=("data/icl/train/icl.json",),
            root="data/icl",
            tokenizer="checkpoints/llava-v1.5-7b/tokenizer",
            batch_size=16,
            bucket_lengths=(768, 1152, 1536, 4096),
            max_images=PICTURES,
            max_regions=0,
            on_error="skip",
            workers=8,
        ),
        optim=OptimConfig(lr=3e-4, trainable=(*TRAINABLE, common.EXAMPLE_READERS), frozen_dtype="bfloat16"),
        loss=dataclasses.replace(LOSS, ce_chunk=common.CE_CHUNK),
        mesh=MeshConfig(data=1, fsdp=16, tensor=-1),  # 16 rows; chips beyond them share heads and MLPs
        init=InitConfig(stage=5, base="runs/7b/stage4"),
        train=TrainConfig(epochs=10),
    )


def tiny() -> ExperimentConfig:
    return ExperimentConfig(
        model=dataclasses.replace(TINY, lora=common.tiny_lora((*common.MLP_LINEAR, "q", "k", "v", "o"))),
        data=DataConfig(
            sources=(f"{common.DEMO}/icl/data/train/train/shown.json",),
            root=f"{common.DEMO}/icl/data/train",
            batch_size=8,
            bucket_lengths=(216,),
            max_images=2 * PICTURES - 1,
            max_regions=0,
            mask_canvas=SIDE,
            workers=0,
        ),
        optim=common.tiny_optim(1e-3, *TRAINABLE),
        loss=LOSS,
        init=InitConfig(stage=5, base=f"{common.DEMO}/icl/stage_IV", sizes="base"),
        train=TrainConfig(steps=400, checkpoint_every=200),
    )
