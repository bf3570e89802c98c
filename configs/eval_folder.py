"""Evaluation on annotation files in MeCoVQA's form: a file, or a folder with test/*.json or *.json (several with
commas between).

COMMAND
    python -m medplib_jax.evaluate --config=configs/eval_folder.py:data/phantom --workdir=runs/results \
        --config.checkpoints=runs/demo/stage_IV
"""

import os

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.sweep import SweepConfig
from medplib_jax.evaluate.tasks import folder_tasks


def get_config(sources: str):
    names = [sources] if os.path.exists(sources) else sources.split(",")  # a comma may belong to the path
    return to_config_dict(SweepConfig(tasks=folder_tasks(*names)))
