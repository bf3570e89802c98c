"""How many greedy answers weights of 8 bits leave as they were, and what they save.

    python -m medplib_jax.benchmarks.agreement --checkpoint runs/demo/stage_IV --data runs/demo/phantom

Prints one line per annotation file and one for all of them: answers whose every token is the same, and bytes of the parameters.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.checkpoint import load_params
from medplib_jax.config.model import ModelConfig
from medplib_jax.data.pipeline import Loader, eval_batches
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.evaluate.tasks import find_tasks, folder_tasks
from medplib_jax.models.language.llama import unstack
from medplib_jax.models.layers import abstract_module, params_of
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.quantize import num_bytes, quantize_params
from medplib_jax.parallel.compilation import use_cache


def agreement(checkpoint: str, sources: list[str], limit: int) -> dict[str, tuple[int, int]]:
    """{task: (answers that stayed, answers)}."""
    experiment, params, tokenizer_dir = load_params(checkpoint)
    params = jax.tree.map(jnp.asarray, params)
    model, tokenizer = experiment.model, Tokenizer.load(tokenizer_dir)
    options = {
        "eos_id": tokenizer.eos_id,
        "seg_id": tokenizer.seg_id,
        "max_new_tokens": experiment.eval.max_new_tokens,
        "max_masks": 0,
    }
    generators = [Generator(model, params, **options, quantize=kind) for kind in ("", "int8")]
    found = {}
    for task in find_tasks(folder_tasks(*sources), limit, experiment.data.on_error, "raise"):
        data = dataclasses.replace(
            experiment.data, max_images=max(task.images, 1), max_regions=task.regions, max_masks=task.masks
        )
        indices, rows = [index for index in task.records if index not in task.skipped], experiment.eval.batch_size
        same = 0
        for arrays, _ in eval_batches(
            Loader([task.source], tokenizer, data, model), indices, rows, range(rows), question=True, workers=0
        ):
            batch = Batch(**arrays)
            answers = [np.asarray(generator(batch).tokens) for generator in generators]
            same += int(((answers[0] == answers[1]).all(1) & (batch.record >= 0)).sum())
        found[task.name] = same, len(indices)
    return found


def bytes_of(model: ModelConfig, dtype) -> tuple[int, int]:
    """Bytes of all parameters, kept in `dtype` and with weights of 8 bits; nothing is allocated."""
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params_of(abstract_module(lambda rngs: MedPLIB(model, rngs)))
    )
    return num_bytes(shapes), num_bytes(
        jax.eval_shape(lambda params: quantize_params(unstack(params, experts_apart=True)), shapes)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, nargs="+")
    parser.add_argument("--limit", type=int, default=0, help="records per file, 0 for all")
    arguments = parser.parse_args()
    use_cache()
    found = agreement(arguments.checkpoint, arguments.data, arguments.limit)
    found["all"] = tuple(map(sum, zip(*found.values())))
    for name, (same, count) in found.items():
        print(f"{name:32} {same:5d} of {count:5d} answers stay ({100 * same / count:.1f} %)")
    model = load_params(arguments.checkpoint)[0].model
    plain, quantized = bytes_of(model, jnp.bfloat16)
    print(f"weights: {plain / 1e6:.1f} MB in bfloat16, {quantized / 1e6:.1f} MB with 8 bits ({quantized / plain:.2f})")


if __name__ == "__main__":
    main()
