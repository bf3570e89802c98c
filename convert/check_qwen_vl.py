"""The comparison of `convert.check` for BiRD: pictures asked in ChatML, features and logits of both sides."""

import os
import pathlib
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.config.experiment import DataConfig
from medplib_jax.data.pipeline import Loader
from medplib_jax.data.records import Record
from medplib_jax.data.tokenizers import load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.layers import bind
from medplib_jax.models.whole import WholeModel

from .sources import Source


def read_both(
    ours, source: Source, images: Sequence[pathlib.Path], questions: Sequence[str]
) -> Iterator[tuple[str, dict, dict, int]]:
    """For each picture and question its name, what JAX and PyTorch compute, and where the answer begins. `ours`:
    `check.OurSide`."""
    import torch

    from .qwen_vl_reference import QwenReference

    config, tokenizer = ours.config, load_tokenizer(ours.tokenizer_folder)
    reference, ends = QwenReference(source.tensors, source.config), {"stop_ids": tokenizer.stop_ids, "seg_id": -1}
    generator = Generator(config, ours.params, DecodeOptions(max_new_tokens=ours.max_new_tokens, max_masks=0), **ends)
    run = jax.jit(lambda params, batch: read(bind(ours.model, params), batch))
    data = DataConfig(template="chatml", bucket_lengths=(config.llm.max_positions,), max_regions=0, max_masks=0)
    for image in images:
        for question in questions:
            turns = (("human", f"<image>\n{question}"),)
            record = Record("command line", 0, "/", (os.path.abspath(image),), turns)
            arrays, _ = Loader([[record]], tokenizer, data, config).load_eval([0], [0], question=True)
            prompt = _without_padding(Batch(**arrays))
            made = generator(prompt)
            answer = np.asarray(made.tokens)[0, : int(made.lengths[0])]
            batch = _continued(prompt, [*answer, tokenizer.eos_id])
            with torch.no_grad():
                theirs = reference.read(batch)
            name, start = f"{image.name}: {question}", prompt.tokens.shape[1]
            yield name, jax.device_get(run(ours.params, batch)), theirs, start


def read(model: WholeModel, batch: Batch) -> dict[str, jax.Array]:
    """Features and logits of the one row, JAX side."""
    output, out = model(batch)
    return {"features": out["visual"][0], "logits": model.llm.logits(output.hidden)[0]}


def _without_padding(batch: Batch) -> Batch:
    length = int(batch.valid.sum())
    names = ("tokens", "valid", "targets", "loss_weights", "feature_index")
    return batch.replace(**{name: np.asarray(getattr(batch, name))[:, :length] for name in names})


def _continued(prompt: Batch, tokens: Sequence[int]) -> Batch:
    more = np.asarray([tokens], np.int32)
    joined = {
        "tokens": more,
        "targets": np.zeros_like(more),
        "valid": np.ones(more.shape, bool),
        "loss_weights": np.zeros(more.shape, np.float32),
        "feature_index": np.full_like(more, -1),
    }
    return prompt.replace(**{name: np.concatenate([getattr(prompt, name), one], 1) for name, one in joined.items()})
