"""A data folder of a few drawn pictures and a tiny checkpoint with random weights, for tests of evaluation and
prediction.
"""

import functools
import json

import jax.numpy as jnp
import numpy as np
from PIL import Image

from medplib_jax import checkpoint
from medplib_jax.config.experiment import DataConfig, EvalConfig, ExperimentConfig
from medplib_jax.config.model import ClipConfig, LlmConfig, MaskConfig, ModelConfig, MoeConfig, RegionConfig
from medplib_jax.data.tokenizers import ADDED_TOKENS, train_tokenizer
from medplib_jax.models.layers import abstract_module, draw_params
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.train.state import TrainState

SIZES = {"ct_00--a.png": (40, 30), "mr_00--b.png": (24, 48)}  # (h, w)
FILES = ("grounding.json", "region.json", "vqa.json")


def write_data(root):
    """images/, masks/ and three annotation files under test/: grounding with one, two and no masks, region, closed and
    open questions.
    """
    for folder in ("images", "masks", "test"):
        (root / folder).mkdir(parents=True)
    records = {file: [] for file in FILES}
    for k, (image, (height, width)) in enumerate(SIZES.items()):
        Image.fromarray(np.random.default_rng(k).integers(0, 255, (height, width, 3), np.uint8)).save(
            root / "images" / image
        )
        masks = [f"masks/{side}-{image}" for side in ("left", "right")]
        left = np.arange(width) < width // 2
        for path, columns in zip(masks, (left, ~left), strict=True):
            Image.fromarray(np.where(columns, 255, 0).astype(np.uint8)[None].repeat(height, 0)).save(root / path)

        def add(file, question, answer, answer_type, image=image):
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            records[file].append({"image": f"images/{image}", "conversations": turns, "answer_type": answer_type})

        add("grounding.json", "Where is the lung?", f"It is <SEG>.<mask>{masks[0]}</mask>", "open")
        both = f"They are <SEG><mask>{masks[0]}</mask> and <SEG>.<mask>{masks[1]}</mask>"
        add("grounding.json", "Where are lung and heart?", both, "open")
        add("grounding.json", "Where is the tumor?", "No, there is no tumor.", "open")
        add("region.json", f"What is <region>{masks[k]}</region>?", ("the left lung", "the right lung")[k], "open")
        add("vqa.json", "Is there a lung?", "Yes", "closed")
        add("vqa.json", "What organ is it?", "left lung", "open")
    for file, content in records.items():
        (root / "test" / file).write_text(json.dumps(content))
    return root


def make_tokenizer(folder):
    words = "Where is the lung? It is the left lung. They are No, there is no tumor or heart. What organ? Yes"
    words += " USER: ASSISTANT:"
    return train_tokenizer([words] * 4, str(folder), 300)


def make_experiment(folder):
    """An experiment around a tiny model with two experts in each of two layers."""
    tokenizer = make_tokenizer(folder)
    model = ModelConfig(
        clip=ClipConfig(28, 14, 16, 2, 2, 16),
        llm=LlmConfig(300 + len(ADDED_TOKENS), 16, 2, 2, 2, 16, max_positions=512),
        moe=MoeConfig(num_experts=2, top_k=1),
        mask=MaskConfig(32, 16, 16, 1, 2, 2, (), True, 16, 4, 1, 2, 16, iou_head_dim=16),
        region=RegionConfig(max_points=32),
    )
    if tokenizer.vocab_size > model.llm.vocab_size:
        raise ValueError(f"tokenizer has {tokenizer.vocab_size} tokens, the model {model.llm.vocab_size}")
    data = DataConfig(tokenizer=str(folder), bucket_lengths=(192, 480), mask_canvas=64, max_masks=2)
    return ExperimentConfig(model=model, data=data, eval=EvalConfig(batch_size=4, max_new_tokens=4))


def write_checkpoint(workdir, seed=0):
    """A finished checkpoint of random weights at step 3; returns the experiment."""
    experiment = make_experiment(workdir / "tokenizer")
    params = draw_params(abstract_module(functools.partial(MedPLIB, experiment.model)), seed)
    state = TrainState(step=jnp.asarray(3), trainable=params, frozen={}, opt_state={})
    with checkpoint.make_manager(str(workdir), keep=1) as manager:
        checkpoint.save(manager, state, experiment, total_steps=3, loss=1.0)
        manager.wait_until_finished()
    return experiment
