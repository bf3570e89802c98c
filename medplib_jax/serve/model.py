"""A checkpoint as the server holds it: the generator, and everything between it and a request."""

import base64
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from medplib_jax.checkpoint import find_step, step_digest
from medplib_jax.data import boxes
from medplib_jax.data.tokenizers import Tokenizer, load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.loading import load_checkpoint
from medplib_jax.decode.masks import PictureMasks
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.serve.engine import Ended
from medplib_jax.serve.pictures import png
from medplib_jax.serve.questions import Message, Part, Prompt, PromptMaker

MAX_REGIONS = 8
MASKS = 4  # drawn per answer at the most
SHORTEST = 64  # positions that the shortest prompts are padded to


@dataclasses.dataclass(frozen=True)
class ServedModel:
    """One loaded checkpoint. `name` is what clients call it, `identity` what its answers depend on.

    `drawer` is None for a model whose answers have boxes in the text instead of masks.
    """

    name: str
    identity: Sequence[Any]
    generator: Generator
    tokenizer: Tokenizer
    make_prompt: PromptMaker
    longest: int  # positions that the longest prompts are padded to
    drawer: PictureMasks | None

    def masks(self, end: Ended, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        """Masks of an answer at the size of its picture, bool [m, h, w], and their predicted IoU [m]."""
        if self.drawer is None or end.mask_logits is None or prompt.size is None:
            return np.zeros((0, 0, 0), bool), np.zeros(0)
        return self.drawer(end.mask_logits, prompt.batch.sam_box, prompt.size), end.predicted_iou

    def boxes(self, text: str, size: tuple[int, int] | None) -> tuple[dict[str, Any], ...]:
        """Boxes in an answer's text: their labels and (x0, y0, x1, y1) in pixels of the picture."""
        if self.drawer is not None or size is None:
            return ()
        return tuple({"label": box.label, "box": list(box.pixels(*size[::-1]))} for box in boxes.read(text))

    def example(self) -> Prompt:
        """A question about a black picture."""
        picture = png(np.zeros((16, 16), bool))
        url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        parts = [Part(type="image_url", image_url=url), Part(type="text", text="What is it?")]
        return self.make_prompt([Message(role="user", content=parts)], [])


def doubling_lengths(image_positions: int, longest: int) -> Sequence[int]:
    """What prompts are padded to: each length twice the one before, beginning where a picture and a question fit."""
    length, lengths = SHORTEST, []
    while length < image_positions + SHORTEST:
        length *= 2
    while length < longest:
        lengths.append(length)
        length *= 2
    return *lengths, longest


def load_model(path: str, name: str, quantize: str, max_new_tokens: int, threshold: float | None) -> ServedModel:
    """The checkpoint that a path names, as `name`.

    FileNotFoundError or ValueError when it cannot be loaded or has no room for questions.
    """
    workdir, step = find_step(path)
    loaded = load_checkpoint(workdir, step, quantize=quantize)
    experiment, tokenizer = loaded.experiment, load_tokenizer(loaded.tokenizer)
    model = experiment.model
    longest = model.llm.max_positions - max_new_tokens
    if longest < model.image_tokens + SHORTEST:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens} leaves {longest} of {model.llm.max_positions} positions for a "
            f"question, expected at least {model.image_tokens + SHORTEST}"
        )
    generator = Generator(
        model,
        loaded.params,
        DecodeOptions(
            max_new_tokens=max_new_tokens, max_masks=MASKS if model.draws_masks else 0, quantize=loaded.quantize
        ),
        stop_ids=tokenizer.stop_ids,
        seg_id=tokenizer.seg_id,
    )
    lengths = doubling_lengths(model.image_tokens, longest)
    maker = PromptMaker(experiment.data, model, tokenizer, lengths, max(1, experiment.data.max_images), MAX_REGIONS)
    threshold = experiment.eval.mask_threshold if threshold is None else threshold
    drawer = PictureMasks(model.mask, threshold) if model.draws_masks else None
    identity = [step_digest(workdir, step), max_new_tokens, threshold, quantize]
    return ServedModel(name, identity, generator, tokenizer, maker, longest, drawer)
