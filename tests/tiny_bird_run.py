"""The smallest run of BiRD: a model of some thousand parameters on a phantom in Med-GRIT's form, packed.

python -m medplib_jax.train --config=tests/tiny_bird_run.py:FOLDER --workdir=... (FOLDER: what `prepare` has filled)
"""

import dataclasses
import itertools
from pathlib import Path

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, OptimConfig, TrainConfig
from medplib_jax.data.sources import open_source
from medplib_jax.datasets.phantom import grit
from medplib_jax.datasets.phantom.generate import generate
from medplib_jax.datasets.train_ranks import conversation_texts, train_ranks
from tests import bird_tiny

LENGTH = 512


def prepare(folder: str | Path) -> None:
    """Writes a phantom of 8 pictures and a tokenizer of 640 ids; what is there is left as it is."""
    folder = Path(folder)
    generate(folder, 8, 2, processes=1)
    grit.write_grit(folder)
    if not (folder / "tokenizer").exists():
        records = itertools.chain(*(open_source(str(folder / name), str(folder)) for name in (grit.LOOK, grit.FIND)))
        train_ranks(conversation_texts(records), str(folder / "tokenizer"), merges=60)


def experiment(folder: str | Path, **changes) -> ExperimentConfig:
    folder = Path(folder)
    llm = dataclasses.replace(bird_tiny.MODEL.llm, max_positions=LENGTH, trained_length=256)
    data = DataConfig(
        sources=(str(folder / grit.LOOK), str(folder / grit.FIND)),
        root=str(folder),
        tokenizer=str(folder / "tokenizer"),
        template="chatml",
        bucket_lengths=(LENGTH,),
        batch_size=8,
        pack=True,
        max_images=3,
        max_regions=0,
        max_masks=0,
        workers=0,
    )
    config = bird_tiny.experiment(
        model=dataclasses.replace(bird_tiny.MODEL, llm=llm),
        data=data,
        optim=OptimConfig(lr=1e-3, schedule="cosine", warmup=0.1, weight_decay=0.1, no_decay=("/bias$",)),
        train=TrainConfig(steps=4, checkpoint_every=2, log_every=1),
    )
    return dataclasses.replace(config, **changes)


def get_config(folder: str):
    return to_config_dict(experiment(folder))
