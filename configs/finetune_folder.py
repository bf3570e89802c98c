"""Training on a folder of your own, in MeCoVQA's form: annotation files *.json, with image and mask paths relative to the folder.

COMMAND
    python -m medplib_jax.datasets.train_tokenizer --sources path/to/folder/*.json --out runs/mine/tokenizer
    python -m medplib_jax.train --config=configs/finetune_folder.py:path/to/folder --workdir=runs/mine/model \
        --config.data.tokenizer=runs/mine/tokenizer --config.model.llm.vocab_size=<as printed by the first command>
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:path/to/folder --workdir=runs/mine/evaluation \
        --config.checkpoints=runs/mine/model

The folder's own annotation files are read, or those in its train/ subfolder when it has none; files whose name says test or validation, and
JSON of other kinds, are left out. A small model (masks of 64 x 64 cells) trains from nothing on words and masks together, sees each record
some hundred times in about 20 minutes on a laptop, and may well know them by heart: with a few dozen images that is what there is to learn.
A record that cannot be used is named, counted and skipped.
"""

import dataclasses
import logging
import pathlib

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, LossConfig, TrainConfig
from medplib_jax.data.splits import annotation_files, is_held_out

from . import common

log = logging.getLogger(__name__)


def _annotations(folder: pathlib.Path) -> list[pathlib.Path]:
    """Files of records for training."""
    files, others = annotation_files(str(folder))
    for other in others:
        log.warning("%s is not a list of records and is left out", other)
    return [path for path in map(pathlib.Path, files) if not is_held_out(path.name)]


def get_config(folder: str):
    """The experiment on the annotation files of `folder`; ValueError when it has none."""
    root = pathlib.Path(folder)
    sources = _annotations(root) or _annotations(root / "train")
    if not sources:
        raise ValueError(f"{root}: expected annotation files *.json in it or in its train/, found none")
    data = DataConfig(
        sources=tuple(map(str, sources)),
        root=str(root),
        tokenizer="runs/mine/tokenizer",
        bucket_lengths=(160, 224, 320, 512),
        batch_size=8,
        max_regions=2,
        max_masks=2,
        mask_canvas=512,
        on_error="skip",
        workers=0,
    )
    return to_config_dict(
        ExperimentConfig(
            model=dataclasses.replace(
                common.TINY, mask=dataclasses.replace(common.TINY.mask, image_size=256, window_size=8)
            ),
            data=data,
            optim=common.tiny_optim(1e-3, ".*"),
            loss=LossConfig(ce=1.0, dice=2.0, bce=2.0),
            train=TrainConfig(steps=1600, checkpoint_every=250),
        )
    )
