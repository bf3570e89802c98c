"""Do a PyTorch folder and a checkpoint hold the same model? Runs both and compares what comes out.

python -m convert.check --torch DIR --checkpoint WORKDIR [--images DIR] [--dtype float32]

The JAX model answers greedily about every picture; then both models read picture, question and answer, closed by <SEG>,
and their logits, greedy choices and masks are compared. Without --images, pictures are made up. The PyTorch side is
`convert.torch_reference`."""

import argparse
import dataclasses
import pathlib
import tempfile
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import torch
from PIL import Image

from convert import from_torch, to_torch
from convert.torch_reference import TorchReference
from medplib_jax.batch import Batch
from medplib_jax.data.tokenizers import Tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.layout import laid_out_model
from medplib_jax.decode.predictor import Predictor
from medplib_jax.models.layers import bind
from medplib_jax.models.masks.sam import normalise_sam
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.vision.clip import normalise_clip

QUESTIONS = ("Please segment the lesion in this image.", "What modality is used to take this image?")
# Largest relative difference of logits and masks, and largest KL divergence (nats), by compute type.
LIMITS = {"float32": (1e-3, 1e-5), "bfloat16": (1e-1, 5e-2)}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One picture and question. Differences are relative to the largest magnitude; `greedy` is the share of equal
    choices."""

    name: str
    logits: float
    kl: float  # mean over the answer's positions, of JAX's distribution from PyTorch's
    greedy: float
    mask: float
    dice: float  # of the two masks at threshold 0

    def passes(self, dtype: str) -> bool:
        largest, kl = LIMITS[dtype]
        enough = 1.0 if dtype == "float32" else 0.9
        return max(self.logits, self.mask) <= largest and self.kl <= kl and min(self.greedy, self.dice) >= enough


def compare(
    torch_source: Sequence[pathlib.Path],
    workdir: pathlib.Path,
    images: Sequence[pathlib.Path],
    dtype: str,
    max_new_tokens: int,
) -> Iterator[Comparison]:
    """Yields one comparison per picture and question."""
    stored = to_torch.open_checkpoint(workdir)
    config, tokenizer = dataclasses.replace(stored.config, dtype=dtype), Tokenizer.load(str(stored.tokenizer))
    reference = TorchReference(from_torch.read_sources(torch_source), config)
    model = laid_out_model(config)  # as the predictor's parameters lie
    predictor = Predictor(workdir, max_new_tokens=max_new_tokens)
    params = predictor.params
    generator = Generator(
        config, params, eos_id=tokenizer.eos_id, seg_id=tokenizer.seg_id, max_new_tokens=max_new_tokens, max_masks=0
    )
    run = jax.jit(lambda params, batch: read(bind(model, params), batch))
    for image in images:
        for question in QUESTIONS:
            _, prompt = predictor.prompt(image, question)
            made = generator(prompt)
            answer = np.asarray(made.tokens)[0, : int(made.lengths[0])]
            batch, start = with_answer(prompt, [*answer, tokenizer.seg_id])
            ours = jax.device_get(run(params, batch))
            with torch.no_grad():
                theirs = read_torch(reference, batch)
            yield comparison(f"{image.name}: {question}", ours, theirs, answer, start)


def with_answer(prompt: Batch, answer: Sequence[int]) -> tuple[Batch, int]:
    """The prompt without padding, continued by the answer whose last token is <SEG>; and where the answer begins."""
    start = int(np.sum(prompt.valid))
    total = start + len(answer)
    tokens, index = np.zeros((1, total), np.int32), np.full((1, total), -1, np.int32)
    tokens[:, :start], index[:, :start] = (
        np.asarray(prompt.tokens)[:, :start],
        np.asarray(prompt.feature_index)[:, :start],
    )
    tokens[0, start:] = answer
    position, valid = np.array([[total - 2]], np.int32), np.ones((1, total), bool)
    return prompt.replace(
        tokens=tokens, feature_index=index, valid=valid, seg_position=position, mask_valid=np.ones((1, 1), bool)
    ), start


def read(model: MedPLIB, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Logits [L, V] and the mask's low-resolution logits, JAX side."""
    output, _ = model(batch)
    return model.llm.logits(output.hidden)[0], output.mask_logits[0, 0]


def read_torch(reference: TorchReference, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """The same from PyTorch."""
    pixels = torch.from_numpy(np.array(normalise_clip(batch.clip_pixels[:, 0]))).permute(0, 3, 1, 2)
    features = reference.project(reference.clip(pixels))[0]
    index = torch.from_numpy(np.asarray(batch.feature_index[0])).long()
    embeddings = reference.weight("model.embed_tokens.weight")[torch.from_numpy(np.asarray(batch.tokens[0])).long()]
    x = torch.where((index >= 0)[:, None], features[index.clamp(min=0)], embeddings)
    hidden = reference.language(x[None])
    logits = reference.linear(hidden[0], "lm_head")
    pixels = torch.from_numpy(np.array(normalise_sam(batch.sam_pixels, batch.sam_box))).permute(0, 3, 1, 2)
    prompt = reference.prompt(hidden[:, int(batch.seg_position[0, 0])])
    mask, _ = reference.decode_mask(reference.encode_image(pixels), prompt)
    return logits.numpy(), mask.numpy()


def comparison(name: str, ours, theirs, answer: np.ndarray, start: int) -> Comparison:
    (logits, mask), (torch_logits, torch_mask) = ours, theirs
    drawn, torch_drawn = mask > 0, torch_mask > 0
    union = drawn.sum() + torch_drawn.sum()
    log_p, log_q = (jax.nn.log_softmax(x[start - 1 : -1].astype(np.float32)) for x in (logits, torch_logits))
    return Comparison(
        name,
        logits=_relative(logits, torch_logits),
        kl=float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))),
        greedy=float((torch_logits[start - 1 : -2].argmax(-1) == answer).mean()) if len(answer) else 1.0,
        mask=_relative(mask, torch_mask),
        dice=float(2 * (drawn & torch_drawn).sum() / union) if union else 1.0,
    )


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max())


def find_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """The folder's pictures. FileNotFoundError when it has none."""
    known = Image.registered_extensions()
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in known)
    if not found:
        raise FileNotFoundError(
            f"--images {folder}: expected pictures, found {sorted(path.name for path in folder.iterdir())[:10]}"
        )
    return found


def made_up_images(folder: pathlib.Path, count: int = 2) -> list[pathlib.Path]:
    """Pictures of random smooth shapes, of different proportions."""
    paths = []
    for i in range(count):
        random = np.random.default_rng(i)
        coarse = Image.fromarray(random.integers(0, 256, (6, 5 + 3 * i, 3), np.uint8))
        paths.append(folder / f"made_up_{i}.png")
        coarse.resize((200 + 100 * i, 240), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--torch", required=True, action="append", type=pathlib.Path, help="folder or file; may be given several times"
    )
    parser.add_argument(
        "--checkpoint", required=True, type=pathlib.Path, help="workdir of a training run or a conversion"
    )
    parser.add_argument("--images", type=pathlib.Path, help="folder of pictures")
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="float32", help="compute type of the JAX side")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    arguments = parser.parse_args(argv)
    precision = "highest" if arguments.dtype == "float32" else "default"  # accelerators multiply in less, unless told
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision(precision):
        images = find_images(arguments.images) if arguments.images else made_up_images(pathlib.Path(folder))
        print("| input | logits | KL | greedy equal | mask logits | Dice |\n|---|---|---|---|---|---|")
        failed = 0
        for result in compare(arguments.torch, arguments.checkpoint, images, arguments.dtype, arguments.max_new_tokens):
            failed += not result.passes(arguments.dtype)
            logits, kl, mask = (f"{value:.1e}" for value in (result.logits, result.kl, result.mask))
            print(f"| {result.name} | {logits} | {kl} | {result.greedy:.2f} | {mask} | {result.dice:.4f} |", flush=True)
    print(f"{failed} comparisons differ" if failed else "the same model")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
