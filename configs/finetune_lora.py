"""LoRA on the released MedPLIB-7B, or on any other checkpoint, with data of your own.

COMMAND
    python -m convert.from_torch --source MedPLIB-7b-2e --kind auto --out checkpoints/medplib-7b
    python -m medplib_jax.train --config=configs/finetune_lora.py:path/to/folder --workdir=runs/mine/lora
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:path/to/folder --workdir=runs/mine/evaluation \
        --config.checkpoints=runs/mine/lora
    python -m convert.to_torch --checkpoint runs/mine/lora --out MedPLIB-mine

`convert/README.md` says what to download for the first command. path/to/folder holds annotation files in MeCoVQA's
form (see finetune_folder.py), or is FOLDER#SPLIT of an assembled dataset. Another model: --config.init.base=WORKDIR,
or WORKDIR/checkpoints/STEP. Sizes and tokenizer are the base's, whose own adapters are merged first.

What trains: new adapters of rank 8 on both experts, q and v, SAM-Med2D's mask decoder and the MLP of <SEG>. All else
stays, frozen in bfloat16. `python -m medplib_jax.aot --config=configs/finetune_lora.py
--topology=v5e:4x4` says what fits; parameters and rows are spread over all devices. --config.optim.accumulate=8 saves
memory at the same batch size.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, InitConfig, LossConfig, OptimConfig, TrainConfig

from . import common


def get_config(folder: str = ""):
    """The experiment on the annotation files of `folder`; ValueError when it has none. Without a folder: for `aot`."""
    sources, root = common.own_sources(folder)
    data = DataConfig(
        sources=sources,
        root=root,
        bucket_lengths=common.BUCKETS_1024,
        batch_size=16,
        max_regions=4,
        max_masks=4,
        on_error="skip",
        workers=8,
    )
    model = dataclasses.replace(common.LARGE, moe=common.EXPERTS, lora=common.lora(8, (*common.MLP_LINEAR, "q", "v")))
    return to_config_dict(
        ExperimentConfig(
            model=model,
            data=data,
            optim=OptimConfig(
                lr=1e-4, trainable=(common.LORA, common.MASK_DECODER, common.SEG_MLP), frozen_dtype="bfloat16"
            ),
            loss=LossConfig(ce=1.0, dice=0.5, bce=2.0, ce_chunk=common.CE_CHUNK),
            mesh=common.POD,
            init=InitConfig(base="checkpoints/medplib-7b", sizes="base"),
            train=TrainConfig(epochs=3, checkpoint_every=100),
        )
    )
