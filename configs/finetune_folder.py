"""Fine-tuning on a folder of your own, in MeCoVQA's form: annotation files *.json, with image and mask paths relative to the folder.

COMMAND (from a demo checkpoint; without init.base it starts from nothing)
    python -m medplib_jax.train --config=configs/finetune_folder.py:path/to/folder --workdir=runs/mine \
        --config.init.base=runs/tiny/stage4 --config.data.tokenizer=data/phantom/tokenizer

The folder's own *.json files are read, or those in its train/ subfolder when it has none. The tiny mixture of experts trains as a
whole, on words and masks together; a record that cannot be used is named, counted and skipped.
"""

import dataclasses
import pathlib

from configs import common
from medplib_jax.experiment import ExperimentConfig, LossConfig, OptimConfig, TrainConfig, to_config_dict


def get_config(folder: str):
    """The experiment on the annotation files of `folder`; ValueError when it has none."""
    root = pathlib.Path(folder)
    sources = sorted(root.glob("*.json")) or sorted((root / "train").glob("*.json"))
    if not sources:
        raise ValueError(f"{root}: expected annotation files *.json in it or in its train/, found none")
    data = dataclasses.replace(
        common.phantom(max_regions=4, max_masks=4), sources=tuple(map(str, sources)), root=str(root), bucket_lengths=(256, 320, 512),
        batch_size=8, mask_canvas=512, on_error="skip",
    )  # fmt: skip
    return to_config_dict(
        ExperimentConfig(
            model=dataclasses.replace(common.TINY, moe=common.EXPERTS),
            data=data,
            optim=OptimConfig(lr=3e-4),
            loss=LossConfig(ce=1.0, dice=0.5, bce=2.0),
            train=TrainConfig(epochs=10, checkpoint_every=100),
        )
    )
