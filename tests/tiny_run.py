"""The smallest run worth the name: 12 steps of a model of some thousand parameters, for trials of stopping and
restarting.

python -m medplib_jax.train --config=tests/tiny_run.py:FOLDER --workdir=... (FOLDER: what `prepare` has filled)
"""

import json
from pathlib import Path

from medplib_jax.config.base import to_config_dict
from medplib_jax.config.experiment import DataConfig, ExperimentConfig, OptimConfig, TrainConfig
from medplib_jax.config.model import ClipConfig, LlmConfig, LoraConfig, ModelConfig
from medplib_jax.data.tokenizers import Tokenizer, train_tokenizer
from medplib_jax.datasets.phantom.generate import generate
from tests.helpers import MODEL

LENGTH = 384


def prepare(folder: str) -> None:
    """Writes a phantom dataset of captions and a tokenizer below `folder`; one that is there is left as it is."""
    generate(Path(folder) / "phantom", 12, 1, processes=1)
    if not (Path(folder) / "tokenizer").exists():
        records = json.loads((Path(folder) / "phantom/train/align.json").read_text())
        train_tokenizer(
            (turn["value"] for record in records for turn in record["conversations"]), f"{folder}/tokenizer", 400
        )


def experiment(folder: str) -> ExperimentConfig:
    """Captions only, no experts and no masks: what matters is the loop.

    Records of one epoch do not fill its last batch.
    """
    model = ModelConfig(
        clip=ClipConfig(image_size=28, patch_size=14, hidden_size=16, num_layers=2, num_heads=2, mlp_dim=32),
        llm=LlmConfig(
            vocab_size=Tokenizer.load(f"{folder}/tokenizer").vocab_size,
            hidden_size=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            mlp_dim=32,
            max_positions=512,
        ),
        mask=MODEL.mask,
        lora=LoraConfig(rank=2, alpha=4.0, dropout=0.1, targets=("gate", "up", "down", "q")),
    )
    data = DataConfig(
        sources=(f"{folder}/phantom/train/align.json",),
        root=f"{folder}/phantom",
        tokenizer=f"{folder}/tokenizer",
        bucket_lengths=(LENGTH,),
        batch_size=8,
        max_regions=0,
        max_masks=0,
        mask_canvas=8,
        workers=0,
    )
    return ExperimentConfig(
        model=model,
        data=data,
        optim=OptimConfig(lr=1e-2, trainable=("lora_[ab]$", "^llm/head/", "^llm/embed/", "^projector/"), warmup=0),
        train=TrainConfig(steps=12, checkpoint_every=3, log_every=1),
    )


def get_config(folder: str):
    return to_config_dict(experiment(folder))
