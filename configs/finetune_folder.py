"""Training on data of your own: a folder in MeCoVQA's form, with image and mask paths relative to it.

COMMAND, from a model that you have (sizes and tokenizer are its own)
    python -m medplib_jax.train --config=configs/finetune_folder.py:path/to/folder --workdir=runs/mine/model \
        --config.init.base=runs/demo/stage_IV

COMMAND, LoRA on the released 7B with the eight chips that Kaggle and Colab give (v5e-8, 16 GB each)
    python -m medplib_jax.train --config=configs/finetune_folder.py:7b_v5e8:path/to/folder --workdir=runs/mine/model

COMMAND, from nothing
    python -m medplib_jax.datasets.train_tokenizer --sources path/to/folder/*.json --out runs/mine/tokenizer
    python -m medplib_jax.train --config=configs/finetune_folder.py:path/to/folder --workdir=runs/mine/model \
        --config.data.tokenizer=runs/mine/tokenizer --config.model.llm.vocab_size=<as printed by the first command>

THEN
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:path/to/folder --workdir=runs/mine/evaluation \
        --config.checkpoints=runs/mine/model

The folder's own annotation files are read, or those in its train/ subfolder when it has none. Files whose name says
test or validation, and JSON of other kinds, are left out. FOLDER#SPLIT of an assembled dataset is taken too. A small
model (masks of 64 x 64 cells) trains from nothing on words and masks together, sees each record some hundred times in
about 20 minutes on a laptop, and may well know them by heart: with a few dozen images that is what there is to learn.
A record that cannot be used is named, counted and skipped. `7b_v5e8` is finetune_lora.py with rows and parameters over
eight chips, from checkpoints/medplib-7b, whose docstring says what trains.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, InitConfig, LossConfig, TrainConfig

from . import common, finetune_lora

V5E8 = "7b_v5e8"  # begins the argument for eight chips


def get_config(folder: str):
    """The experiment on the annotation files of `folder` (after `V5E8:` at 7B); ValueError when it has none. V5E8
    alone is for `aot`.
    """
    size, _, rest = folder.partition(":")
    if size == V5E8:
        return on_eight_chips(rest)
    sources, root = common.own_sources(folder)
    data = DataConfig(
        sources=sources,
        root=root,
        bucket_lengths=(160, 224, 320, 512),
        batch_size=8,
        max_regions=2,
        max_masks=2,
        mask_canvas=512,
        on_error="skip",
        workers=0,
    )
    mask = dataclasses.replace(common.TINY.mask, image_size=256, window_size=8)
    return to_config_dict(
        ExperimentConfig(
            model=dataclasses.replace(common.TINY, mask=mask),
            data=data,
            optim=common.tiny_optim(1e-3, ".*"),
            loss=LossConfig(ce=1.0, dice=2.0, bce=2.0),
            init=InitConfig(sizes="base"),
            train=TrainConfig(steps=1600, checkpoint_every=250),
        )
    )


def on_eight_chips(folder: str):
    """LoRA at 7B: a row of 1,024 tokens on each chip, parameters over all of them."""
    config = finetune_lora.get_config(folder)
    config.data.batch_size = 8
    config.mesh.fsdp = 8
    return config
