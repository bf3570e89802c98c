"""A checkpoint as the server holds it: the generator, and everything between it and a request."""

import base64
import dataclasses
import os
from collections.abc import Sequence

import numpy as np

from medplib_jax.batch import Batch
from medplib_jax.data.tokenizers import Tokenizer, load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.decode.masks import PictureMasks
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.serve.pictures import png
from medplib_jax.serve.questions import Message, Part, PromptMaker

MAX_REGIONS = 8
MASKS = 4  # drawn per answer at the most
SHORTEST = 64  # positions that the shortest prompts are padded to


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One loaded checkpoint. `name` is what clients call it."""

    name: str
    generator: Generator
    tokenizer: Tokenizer
    make_prompt: PromptMaker
    longest: int  # positions that the longest prompts are padded to
    drawer: PictureMasks

    def example(self) -> Batch:
        """A question about a black picture."""
        picture = png(np.zeros((16, 16), bool))
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts = [Part(type="image_url", image_url=url), Part(type="text", text="What is it?")]
        return self.make_prompt([Message(role="user", content=parts)], []).batch


def prompt_lengths(image_positions: int, longest: int) -> Sequence[int]:
    """What prompts are padded to: each length twice the one before, beginning where a picture and a question fit."""
    length, lengths = SHORTEST, []
    while length < image_positions + SHORTEST:
        length *= 2
    while length < longest:
        lengths.append(length)
        length *= 2
    return *lengths, longest


def load_model(path: str | os.PathLike, quantize: str, max_new_tokens: int, threshold: float | None) -> ServedModel:
    """The checkpoint that a path names. FileNotFoundError or ValueError when it cannot be loaded or has no room."""
    loaded = load_checkpoint(path, quantize=quantize)
    experiment, tokenizer = loaded.experiment, load_tokenizer(loaded.tokenizer)
    model = experiment.model
    if not model.draws_masks:
        raise ValueError(f"{path}: a model whose answers have boxes is not served yet, expected one that draws masks")
    longest = model.llm.max_positions - max_new_tokens
    if longest < model.image_tokens + SHORTEST:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} leaves {longest} of {model.llm.max_positions} positions for a "
            f"question, expected at least {model.image_tokens + SHORTEST}"
        )
    generator = Generator(
        model,
        loaded.params,
        DecodeOptions(max_new_tokens=max_new_tokens, max_masks=MASKS, quantize=loaded.quantize),
        stop_ids=tokenizer.stop_ids,
        seg_id=tokenizer.seg_id,
    )
    lengths = prompt_lengths(model.image_tokens, longest)
    maker = PromptMaker(experiment.data, model, tokenizer, lengths, max(1, experiment.data.max_images), MAX_REGIONS)
    drawer = PictureMasks(model.mask, experiment.eval.mask_threshold if threshold is None else threshold)
    name = os.path.basename(os.path.normpath(path))
    return ServedModel(name, generator, tokenizer, maker, longest, drawer)
