"""BiRD on data of your own: a folder that `write_qa` or `import_dataset --dataset med_grit` made.

COMMAND
    python -m medplib_jax.datasets.write_qa --pairs data/mine --out data/mine_qa --writer template
    python -m medplib_jax.train --config=configs/bird_folder.py:data/mine_qa --workdir=runs/mine/bird \
        --config.init.base=runs/demo/bird/model
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:data/mine_qa/grit --workdir=runs/mine/bird_results \
        --config.checkpoints=runs/mine/bird

Sizes and tokenizer are those of `init.base`, a BiRD of any size; `bash launch/demo.sh --bird` makes the one above. All
of it trains but where the resampler's queries look (`bird_grit.FROM_NOTHING`): a few dozen pictures are then known by
heart. To adapt the released 9.6B take `bird_grit.py:lora` with `--config.data.sources` and `--config.data.root`.
"""

import dataclasses
import pathlib

from configs import bird_grit, common
from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import InitConfig, TrainConfig


def get_config(folder: str):
    """The experiment on the records of `folder`, of its grit/ where it has one; ValueError when there are none."""
    own = pathlib.Path(folder, "grit")
    sources, root = common.own_sources(str(own) if own.is_dir() else folder)
    config = bird_grit.rough()
    data = dataclasses.replace(
        config.data,
        sources=sources,
        root=folder if own.is_dir() else root,
        tokenizer="",
        bucket_lengths=(160, 192, 448, 1024),
        batch_size=8,
        on_error="skip",
    )
    return to_config_dict(
        dataclasses.replace(
            config,
            data=data,
            optim=dataclasses.replace(config.optim, lr=5e-4, lr_scale=()),
            init=InitConfig(base=f"{bird_grit.DEMO}/model", sizes="base"),
            eval=dataclasses.replace(config.eval, max_new_tokens=512),  # a report on a picture of many things
            train=TrainConfig(steps=1500, checkpoint_every=500),
        )
    )
