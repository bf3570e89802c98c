"""How fast records become batches, beside the obvious PyTorch DataLoader of the same preprocessing.

All variants read the same records in this process, in turns, and the fastest round counts; "assembled" reads what
`datasets.assemble` made of them. CPU time, not wall time, so that other work on the machine matters little.
"""

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image
from scipy import ndimage

from medplib_jax.benchmarks.measure import Table
from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data import pipeline
from medplib_jax.data.prompts import encode_conversation
from medplib_jax.datasets.assemble.dataset import assemble
from medplib_jax.datasets.processes import HERE

MODEL = ModelConfig()  # 336 and 256 pixels, 576 image tokens
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def config(sources: tuple[str, ...], root: str, tokenizer: str, batch_size: int = 16) -> DataConfig:
    return DataConfig(
        sources=sources,
        root=root,
        tokenizer=tokenizer,
        bucket_lengths=(768, 1024, 1664),
        batch_size=batch_size,
        mask_canvas=1024,
        on_error="skip",
        workers=0,
    )


def torch_batches(data: DataConfig) -> Iterator[dict]:
    """The obvious way: a map-style Dataset of float tensors, and a DataLoader that pads and stacks them."""
    import torch

    torch.set_num_threads(1)
    loader = pipeline.make_loader(data, MODEL, data.root)

    class Records(torch.utils.data.Dataset):
        def __len__(self):
            return len(loader)

        def __getitem__(self, index):
            record = loader.record(index)
            encoded = encode_conversation(
                record,
                loader.tokenizer,
                template=data.template,
                image_tokens=1,
                max_images=1,
                max_length=data.bucket_lengths[-1],
            )
            rgb = np.asarray(Image.open(record.path(record.images[0])).convert("RGB"))
            example = {
                "tokens": torch.tensor(encoded.tokens, dtype=torch.long),
                "labels": torch.tensor(np.where(encoded.loss_weights > 0, encoded.targets, -100), dtype=torch.long),
                "clip": _clip(torch, rgb),
                "sam": _sam(torch, rgb),
                "masks": [
                    torch.from_numpy((_grey(record.path(name)) >= 1).astype(np.float32)) for name in encoded.masks
                ],
                "regions": [_region(torch, _grey(record.path(name))) for name in encoded.regions],
            }
            return example

    def collate(examples):
        def pad(name, value):
            return torch.nn.utils.rnn.pad_sequence(
                [one[name] for one in examples], batch_first=True, padding_value=value
            )

        stacked = {name: torch.stack([one[name] for one in examples]) for name in ("clip", "sam")}
        lists = {name: [one[name] for one in examples] for name in ("masks", "regions")}
        return {"tokens": pad("tokens", 0), "labels": pad("labels", -100), **stacked, **lists}

    return iter(torch.utils.data.DataLoader(Records(), batch_size=data.batch_size, shuffle=True, collate_fn=collate))


def _resized(rgb: np.ndarray, side: int) -> np.ndarray:
    scale = side / max(rgb.shape[:2])
    height, width = (int(length * scale + 0.5) for length in rgb.shape[:2])
    return np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))


def _padded(torch, x, side: int, value: float):
    rest = [side - length for length in x.shape[-2:]]
    return torch.nn.functional.pad(
        x, (rest[1] // 2, rest[1] - rest[1] // 2, rest[0] // 2, rest[0] - rest[0] // 2), value=value
    )


def _normalised(torch, x, mean, std):
    return (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


def _clip(torch, rgb):
    x = torch.from_numpy(_resized(rgb, 336)).permute(2, 0, 1).contiguous()
    padded = torch.stack(
        [_padded(torch, channel, 336, int(255 * mean)) for channel, mean in zip(x, CLIP_MEAN, strict=True)]
    )
    return _normalised(torch, padded.float() / 255, CLIP_MEAN, CLIP_STD)


def _sam(torch, rgb):
    x = torch.from_numpy(_resized(rgb, 256)).permute(2, 0, 1).float()
    return _padded(torch, _normalised(torch, x, SAM_MEAN, SAM_STD), 256, 0.0)


def _grey(path: str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("L"))


def _region(torch, mask: np.ndarray):
    canvas = _padded(torch, torch.from_numpy(_resized((mask >= 1).astype(np.uint8), 336)), 336, 0)
    cells = canvas[::14, ::14].numpy()
    labels, count = ndimage.label(cells, np.ones((3, 3)))
    largest = 1 + np.argmax(np.bincount(labels.ravel(), minlength=count + 1)[1:]) if count else 1
    return torch.from_numpy((labels == largest).astype(np.float32))[None]


def our_batches(data: DataConfig) -> Iterator[tuple]:
    loader = pipeline.make_loader(data, MODEL, data.root, cache_bytes=0)
    plan, _ = loader.plan(seed=0)
    return (loader.load_batch(plan, step, range(data.batch_size)) for step in range(plan.steps_per_epoch))


def milliseconds(make: Callable[[], Iterator], records: int) -> float:
    """CPU milliseconds of this process per record in an epoch, without reading the annotations before."""
    batches = make()
    began = time.process_time()
    for _ in batches:
        pass
    return (time.process_time() - began) / records * 1e3


def assembled(data: DataConfig, out: str) -> DataConfig:
    """The same data as `datasets.assemble` writes them.

    ValueError when it leaves records out, because the comparison would be uneven.
    """
    manifest = assemble(data.root, data.root, out, HERE)
    if manifest["left_out"]:
        raise ValueError(f"{data.root}: expected records that can all be assembled, found {manifest['left_out']}")
    return dataclasses.replace(data, sources=tuple(manifest["sources"]))


def measure(data: DataConfig, rounds: int) -> Table:
    """A row per variant."""
    times = compare(data, rounds)
    rows = [(name, f"{value:.2f}", f"{times['PyTorch DataLoader'] / value:.1f}") for name, value in times.items()]
    flat = {f"data.{name.replace(' ', '_').replace(',', '')}.ms": value for name, value in times.items()}
    return Table("Reading records", ("", "ms per record and core", "times PyTorch's rate"), rows, flat)


def compare(data: DataConfig, rounds: int) -> dict[str, float]:
    """Milliseconds of one core per record for each variant, the fastest of the rounds.

    Nothing is kept in memory from record to record.
    """
    records = len(pipeline.make_loader(data, MODEL, data.root))
    times: dict[str, float] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            cached = dataclasses.replace(data, cache=os.path.join(folder, "cache"))
            shards = assembled(data, os.path.join(folder, "assembled"))
            variants = {
                "PyTorch DataLoader": lambda: torch_batches(data),
                "no cache": lambda: our_batches(data),
                "assembled, no cache": lambda shards=shards: our_batches(shards),
                "disk cache, first epoch": lambda cached=cached: our_batches(cached),
                "disk cache, later epochs": lambda cached=cached: our_batches(cached),
            }
            for name, make in variants.items():
                times[name] = min(milliseconds(make, records), times.get(name, np.inf))
    return times
