"""Do a PyTorch folder and a checkpoint hold the same model? Runs both and compares what comes out.

python -m convert.check --torch DIR --checkpoint WORKDIR [--images DIR] [--dtype float32]

The JAX model answers greedily about every picture. Then both models read picture, question and answer, closed by <SEG>,
and their picture features, logits, greedy choices and masks are compared. Parts that one side lacks are named and left
out. Without --images, pictures are made up. The PyTorch side is `convert.torch_reference`, with the sizes that the
PyTorch folder tells. Ends 1 when something differs.
"""

import argparse
import dataclasses
import functools
import pathlib
import tempfile
from collections.abc import Collection, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from medplib_jax import checkpoint
from medplib_jax.batch import Batch
from medplib_jax.config.model import LlmConfig, LoraConfig, ModelConfig, MoeConfig
from medplib_jax.data import hub
from medplib_jax.data.images import clip_pixels, load_image, sam_pixels
from medplib_jax.data.tokenizers import AnyTokenizer, load_tokenizer
from medplib_jax.decode.generator import Generator
from medplib_jax.decode.options import DecodeOptions
from medplib_jax.models.families import build_model
from medplib_jax.models.layers import abstract_module, bind, params_of
from medplib_jax.models.masks.sam import normalise_sam
from medplib_jax.models.medplib import MedPLIB
from medplib_jax.models.vision.clip import normalise_clip
from medplib_jax.parallel.quiet import ignore_missing_tpu

from . import check_qwen_vl, kinds
from .sources import Source, read_source

QUESTIONS = ("Please segment the lesion in this image.", "What modality is used to take this image?")
# Largest relative difference of features, logits and masks, and largest KL divergence (nats), by compute type.
LIMITS = {"float32": (1e-3, 1e-5), "bfloat16": (1e-1, 5e-2)}
COMPARED = {"clip", "projector", "llm", "seg_mlp", "sam", "vit", "resampler", "post_norm", "proj"}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One picture and question. Differences are relative to the largest magnitude; None: one side lacks the part.

    `kl` is the mean over the answer's positions, of JAX's distribution from PyTorch's. `greedy` is the share of equal
    choices, `dice` that of the two masks at threshold 0.
    """

    name: str
    features: float | None = None
    logits: float | None = None
    kl: float | None = None
    greedy: float | None = None
    mask: float | None = None
    dice: float | None = None

    def passes(self, dtype: str) -> bool:
        largest, kl = LIMITS[dtype]
        enough = 1.0 if dtype == "float32" else 0.9
        small = ((self.features, largest), (self.logits, largest), (self.mask, largest), (self.kl, kl))
        passed = [value <= limit for value, limit in small if value is not None]  # what is not a number does not pass
        return all(passed) and all(value >= enough for value in (self.greedy, self.dice) if value is not None)

    def row(self) -> str:
        numbers = [self.features, self.logits, self.kl, self.greedy, self.mask, self.dice]
        formats = ("{:.1e}", "{:.1e}", "{:.1e}", "{:.2f}", "{:.1e}", "{:.4f}")
        cells = ("" if value is None else form.format(value) for value, form in zip(numbers, formats, strict=True))
        return f"| {self.name} | {' | '.join(cells)} |"


class OurSide:
    """The checkpoint's model, which computes `parts`; parameters that it does not have are zero and serve no
    comparison."""

    def __init__(self, path: pathlib.Path, dtype: str, max_new_tokens: int):
        experiment, params, tokenizer = checkpoint.load_params(str(path))
        moe = dataclasses.replace(experiment.model.moe, dispatch="dropless")  # no token may depend on another's
        self.config = without(set(params), dataclasses.replace(experiment.model, dtype=dtype, moe=moe))
        self.parts, self.tokenizer_folder, self.max_new_tokens = set(params), tokenizer, max_new_tokens
        self.model = abstract_module(lambda rngs: build_model(self.config, rngs))
        known = params_of(self.model)
        self.params = {
            part: params[part] if part in params else jax.tree.map(_zeros, shapes) for part, shapes in known.items()
        }

    @functools.cached_property
    def tokenizer(self) -> AnyTokenizer:
        return load_tokenizer(self.tokenizer_folder)

    @functools.cached_property
    def generator(self) -> Generator:
        tokens = {"stop_ids": self.tokenizer.stop_ids, "seg_id": self.tokenizer.seg_id}
        return Generator(
            self.config, self.params, DecodeOptions(max_new_tokens=self.max_new_tokens, max_masks=0), **tokens
        )

    def answered(self, image: pathlib.Path, question: str, words: int, shared: Collection[str]) -> tuple[Batch, int]:
        """Picture, question, greedy answer and a last token that asks for a mask, all of them of the first `words`
        tokens; and where the answer begins. Without `shared` eyes there is no picture in it."""
        tokenizer = self.tokenizer
        patches = self.config.clip.num_patches if {"clip", "projector"} <= set(shared) else 0
        asked = [tokenizer.bos_id, *(t for t in tokenizer.encode(question) if t < words)]
        shown = picture(image, self.config)
        made = self.generator(with_text(shown, asked, patches))
        answer = [int(token) for token in np.asarray(made.tokens)[0, : int(made.lengths[0])] if token < words]
        closing = tokenizer.seg_id if tokenizer.seg_id < words else tokenizer.eos_id
        return with_text(shown, [*asked, *answer, closing], patches), patches + len(asked)


def without(parts: set[str], config: ModelConfig) -> ModelConfig:
    """The configuration with few layers and small widths in the `parts` that are not there, of which the others see
    nothing."""
    if not config.draws_masks:
        return config  # all of its parts are always there
    if "clip" not in parts:
        eyes = dataclasses.replace(config.clip, image_size=2 * config.clip.patch_size, num_layers=2, mlp_dim=8)
        config = dataclasses.replace(config, clip=eyes)
    if "llm" not in parts:
        width = config.llm.hidden_size if parts & {"projector", "region", "seg_mlp"} else 8
        small = LlmConfig(hidden_size=width, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8, vocab_size=8)
        config = dataclasses.replace(config, llm=small, moe=MoeConfig(), lora=LoraConfig())
    if "sam" not in parts:
        config = dataclasses.replace(config, mask=dataclasses.replace(config.mask, num_layers=1, global_layers=(0,)))
    return config


def _zeros(leaf) -> np.ndarray:
    return np.zeros(leaf.shape, np.float32)


def torch_parts(source: Source) -> set[str]:
    return {kinds.part_of(key) for key in source.tensors} - {None}


def compare(ours: OurSide, source: Source, images: Sequence[pathlib.Path]) -> Iterator[Comparison]:
    """Yields one comparison per picture and question, of the parts that both have."""
    from .torch_reference import TorchReference

    if not ours.config.draws_masks:
        for name, *found, start in check_qwen_vl.read_both(ours, source, images, QUESTIONS):
            yield comparison(name, *found, start)
        return
    shared = ours.parts & torch_parts(source)
    reference = TorchReference(source.tensors, source.config)
    read = jax.jit(lambda params, batch: read_model(bind(ours.model, params), batch, shared))
    for image in images:
        if "llm" not in shared:
            batch = picture(image, ours.config)
            found = jax.device_get(read(ours.params, batch)), read_torch(reference, batch, shared)
            yield comparison(image.name, *found, start=0)
            continue
        for question in QUESTIONS:
            batch, start = ours.answered(image, question, source.config.llm.vocab_size, shared)
            found = jax.device_get(read(ours.params, batch)), read_torch(reference, batch, shared)
            yield comparison(f"{image.name}: {question}", *found, start)


def picture(image: pathlib.Path, config: ModelConfig) -> Batch:
    """A batch of one picture and no text."""
    pixels = load_image(str(image))
    sam_canvas, box = sam_pixels(pixels, config.mask.image_size)
    none = np.zeros((1, 0), np.int32)
    return Batch(
        tokens=none,
        valid=none.astype(bool),
        targets=none,
        loss_weights=none.astype(np.float32),
        feature_index=none,
        clip_pixels=clip_pixels(pixels, config.clip.image_size)[None, None],
        sam_pixels=sam_canvas[None],
        sam_box=np.asarray(box, np.int32)[None],
        region_points=np.zeros((1, 0, 0, 2), np.float32),
        region_point_valid=np.zeros((1, 0, 0), bool),
        region_image=none,
        seg_position=np.zeros((1, 1), np.int32),
        mask_valid=np.ones((1, 1), bool),
        gt_masks=np.zeros((1, 1, 1, 1), np.uint8),
        mask_size=np.ones((1, 2), np.int32),
        record=np.zeros(1, np.int32),
    )


def with_text(batch: Batch, tokens: Sequence[int], patches: int) -> Batch:
    """The picture's `patches` features behind the first token, then the other tokens. The last one asks for a mask: it
    is predicted at the position before it."""
    total = len(tokens) + patches
    ids, index = np.zeros((1, total), np.int32), np.full((1, total), -1, np.int32)
    ids[0, 0], ids[0, 1 + patches :] = tokens[0], tokens[1:]
    index[0, 1 : 1 + patches] = np.arange(patches)
    position = np.array([[total - 2]], np.int32)
    return batch.replace(tokens=ids, feature_index=index, valid=np.ones((1, total), bool), seg_position=position)


def read_model(model: MedPLIB, batch: Batch, shared: Collection[str]) -> dict[str, jax.Array]:
    """What both sides have of features [P, C or D], logits [L, V] and low-resolution mask logits [h, w], JAX side."""
    made, hidden = {}, None
    if "clip" in shared:
        image, out = model.visual_features(batch)
        made["features"] = image[0] if "projector" in shared else out["clip_features"][0]
    if "llm" in shared:
        x, _ = model.embed(batch)
        hidden, _ = model.llm(x, batch.valid)
        made["logits"] = model.llm.logits(hidden)[0]
    if "sam" in shared:
        embedding = model.sam.encode(normalise_sam(batch.sam_pixels, batch.sam_box).astype(model.config.dtype))
        asks = jnp.ones((1, 1, model.config.mask.out_dim), embedding.dtype)
        if hidden is not None and "seg_mlp" in shared:
            asks = model.seg_mlp(jnp.take_along_axis(hidden, batch.seg_position[:, :, None], axis=1))
        made["mask"] = model.sam.decode(embedding, asks)[0][0, 0]
    return made


def read_torch(reference, batch: Batch, shared: Collection[str]) -> dict[str, np.ndarray]:
    """The same from PyTorch, by a `convert.torch_reference.TorchReference`."""
    import torch

    with torch.no_grad():
        return {name: values.float().numpy() for name, values in _read_torch(reference, batch, shared).items()}


def _read_torch(reference, batch: Batch, shared: Collection[str]) -> dict:
    import torch

    made, hidden = {}, None
    if "clip" in shared:
        pixels = torch.from_numpy(np.array(normalise_clip(batch.clip_pixels[:, 0]))).permute(0, 3, 1, 2)
        made["features"] = reference.clip(pixels)[0]
        if "projector" in shared:
            made["features"] = reference.project(made["features"])
    if "llm" in shared:
        index = torch.from_numpy(np.asarray(batch.feature_index[0])).long()
        ids = torch.from_numpy(np.asarray(batch.tokens[0])).long()
        x = reference.weight("model.embed_tokens.weight")[ids]
        if (index >= 0).any():
            x = torch.where((index >= 0)[:, None], made["features"][index.clamp(min=0)], x)
        hidden = reference.language(x[None])
        made["logits"] = reference.linear(hidden[0], "lm_head")
    if "sam" in shared:
        pixels = torch.from_numpy(np.array(normalise_sam(batch.sam_pixels, batch.sam_box))).permute(0, 3, 1, 2)
        asks = torch.ones(1, reference.config.mask.out_dim)
        if hidden is not None and "seg_mlp" in shared:
            asks = reference.prompt(hidden[:, int(batch.seg_position[0, 0])])
        made["mask"] = reference.decode_mask(reference.encode_image(pixels), asks)[0]
    return made


def comparison(name: str, ours: dict, theirs: dict, start: int) -> Comparison:
    """`start`: where the answer begins; before its last token lies what is compared as greedy choices."""
    found = {what: _relative(ours[what], theirs[what]) for what in theirs if what != "logits"}
    if "logits" in theirs:
        words = theirs["logits"].shape[-1]
        logits = np.asarray(ours["logits"], np.float32)[:, :words]  # tokens that PyTorch's side lacks come last
        log_p, log_q = (jax.nn.log_softmax(x[start - 1 : -1]) for x in (logits, theirs["logits"]))
        chosen = [x[start - 1 : -1].argmax(-1) for x in (logits, theirs["logits"])]
        found |= {
            "logits": _relative(logits, theirs["logits"]),
            "kl": float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), -1))),
            "greedy": float((chosen[0] == chosen[1]).mean()),
        }
    if "mask" in theirs:
        drawn, torch_drawn = ours["mask"] > 0, theirs["mask"] > 0
        union = drawn.sum() + torch_drawn.sum()
        found["dice"] = float(2 * (drawn & torch_drawn).sum() / union) if union else 1.0
    return Comparison(name, **found)


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


def left_out(ours: OurSide, source: Source) -> Iterator[str]:
    """One line about each part that is not compared, and about each size that the two sides give differently."""
    theirs = torch_parts(source)
    for part in sorted((ours.parts | theirs) - (ours.parts & theirs & COMPARED)):
        sides = [name for name, parts in (("the checkpoint", ours.parts), ("PyTorch's side", theirs)) if part in parts]
        yield f"not compared: {part}, of {' and '.join(sides)}"
    for field, part in (("clip", "clip"), ("llm", "llm"), ("moe", "llm"), ("mask", "sam"), ("vit", "vit")):
        if part in ours.parts & theirs:
            one, other = (dataclasses.asdict(getattr(c, field)) for c in (ours.config, source.config))
            for name in one:
                if one[name] != other[name] and name not in ("dispatch", "vocab_size"):
                    yield f"{field}.{name}: {one[name]} in the checkpoint, {other[name]} on PyTorch's side"


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; returns how many comparisons differ."""
    source = read_source(arguments.torch, arguments.config, arguments.lora_alpha, tuple(arguments.ignore_key))
    ours = OurSide(arguments.checkpoint, arguments.dtype, arguments.max_new_tokens)
    if not ours.parts & torch_parts(source) & COMPARED - {"projector", "seg_mlp"}:
        raise ValueError(f"nothing to compare: {sorted(ours.parts)} and {sorted(torch_parts(source))}")
    for line in left_out(ours, source):
        print(line)
    print("| input | features | logits | KL | greedy equal | mask logits | Dice |\n|---|---|---|---|---|---|---|")
    failed = 0
    precision = "highest" if arguments.dtype == "float32" else "default"  # accelerators multiply in less, unless told
    with tempfile.TemporaryDirectory() as folder, jax.default_matmul_precision(precision):
        pictures = find_images(arguments.images) if arguments.images else made_up_images(pathlib.Path(folder))
        for result in compare(ours, source, pictures):
            failed += not result.passes(arguments.dtype)
            print(result.row(), flush=True)
    return failed


def main(argv: Sequence[str] | None = None) -> None:
    ignore_missing_tpu()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", required=True, action="append", type=hub.argument, help="as --source of from_torch")
    parser.add_argument("--checkpoint", required=True, type=pathlib.Path, help="workdir, or WORKDIR/checkpoints/STEP")
    parser.add_argument("--images", type=pathlib.Path, help="folder of pictures")
    parser.add_argument("--config", type=pathlib.Path, help="folder with PyTorch's config.json, where --torch has none")
    parser.add_argument("--lora_alpha", type=float, help="of PyTorch's adapters without an adapter_config.json")
    parser.add_argument("--ignore_key", action="append", default=[], help="key of config.json that changes nothing")
    parser.add_argument("--dtype", choices=sorted(LIMITS), default="float32", help="compute type of the JAX side")
    parser.add_argument("--max_new_tokens", type=int, default=12)
    try:
        failed = run(parser.parse_args(argv))
    except (OSError, ValueError, ImportError) as error:
        raise SystemExit(f"check: {error}") from error
    print(f"{failed} comparisons differ" if failed else "the same model")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
