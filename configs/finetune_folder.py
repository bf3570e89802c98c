"""Training on data of your own: a folder in MeCoVQA's form, with image and mask paths relative to it.

COMMAND, from a model that you have (sizes and tokenizer are its own)
    python -m medplib_jax.train --config=configs/finetune_folder.py:path/to/folder --workdir=runs/mine/model \
        --config.init.base=runs/demo/stage_IV

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
A record that cannot be used is named, counted and skipped. To adapt a model of 7B, see finetune_lora.py.
"""

import dataclasses

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, InitConfig, LossConfig, TrainConfig

from . import common


def get_config(folder: str):
    """The experiment on the annotation files of `folder`; ValueError when it has none."""
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
