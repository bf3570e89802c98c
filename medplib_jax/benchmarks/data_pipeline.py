"""How fast records become batches, beside the obvious PyTorch DataLoader of the same preprocessing; and whether workers' memory stays flat.

    python -m medplib_jax.benchmarks.data_pipeline --data DIR --tokenizer FOLDER                  # milliseconds of one core per record
    python -m medplib_jax.benchmarks.data_pipeline --data DIR --tokenizer FOLDER --memory 50000   # MB of a worker over that many records

DIR holds annotation files in MeCoVQA's form and images/. All variants read the same records in this process, in turns, and the fastest round
counts; "assembled" reads what `datasets.assemble` made of DIR. CPU time, not wall time, so that other work on the machine matters little.
Expect at least 3 times the samples per core of PyTorch from assembled data, and later epochs with a cache at least 10 times faster than the
first without.
"""

import dataclasses
import glob
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import psutil
from absl import app, flags
from PIL import Image
from scipy import ndimage

from medplib_jax.config.experiment import DataConfig
from medplib_jax.config.model import ModelConfig
from medplib_jax.data import pipeline
from medplib_jax.data.prompts import encode_conversation
from medplib_jax.datasets.assemble.dataset import assemble

_DATA = flags.DEFINE_string("data", None, "folder with annotation files, paths relative to it", required=True)
_TOKENIZER = flags.DEFINE_string("tokenizer", None, "folder of a tokenizer", required=True)
_MEMORY = flags.DEFINE_integer(
    "memory", 0, "records to read in a worker process while its memory is watched; 0: measure time"
)
_ROUNDS = flags.DEFINE_integer("rounds", 3, "of which the fastest counts")

MODEL = ModelConfig()  # 336 and 256 pixels, 576 image tokens
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
SAM_MEAN, SAM_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


def config(folder: str, tokenizer: str, **changes) -> DataConfig:
    sources = tuple(sorted(glob.glob(os.path.join(folder, "*.json"))))
    values = {
        "bucket_lengths": (768, 1024, 1664),
        "batch_size": 16,
        "mask_canvas": 1024,
        "on_error": "skip",
        "workers": 0,
    }
    return DataConfig(sources=sources, root=folder, tokenizer=tokenizer, **values | changes)


def torch_batches(data: DataConfig) -> Iterator[dict]:
    """The obvious way: a map-style Dataset that prepares one record as float tensors, and a DataLoader that pads and stacks them."""
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
    """CPU milliseconds of this process per record in an epoch; making the iterator (reading the annotations) does not count."""
    batches = make()
    began = time.process_time()
    for _ in batches:
        pass
    return (time.process_time() - began) / records * 1e3


def assembled(data: DataConfig, out: str) -> DataConfig:
    """The same data as `datasets.assemble` writes them. ValueError when it leaves records out, because the comparison would be uneven."""
    manifest = assemble(data.root, data.root, out, workers=0)
    if manifest["left_out"]:
        raise ValueError(f"{data.root}: expected records that can all be assembled, found {manifest['left_out']}")
    return dataclasses.replace(data, sources=tuple(manifest["sources"]))


def compare(data: DataConfig, rounds: int) -> dict[str, float]:
    """Milliseconds of one core per record for each variant, the fastest of the rounds. Nothing is kept in memory from record to record."""
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


def worker_memory(data: DataConfig, records: int) -> list[tuple[int, float]]:
    """(records read, MB of memory of the worker process, shared parts counted) ten times over the run."""
    loader = pipeline.make_loader(data, MODEL, data.root)
    plan, _ = loader.plan(seed=0)
    steps = records // data.batch_size
    marks = set(np.linspace(1, steps, 10).astype(int).tolist())
    found = []
    for step, _ in enumerate(pipeline.train_batches(loader, plan, range(data.batch_size), 0, steps, workers=1), 1):
        if step in marks:
            children = psutil.Process().children(recursive=True)
            found.append((step * data.batch_size, max(child.memory_info().rss for child in children) / 2**20))
            print(f"{found[-1][0]:>8} records  {found[-1][1]:8.0f} MB", flush=True)
    return found


def main(argv: Sequence[str]) -> None:
    del argv
    data = config(_DATA.value, _TOKENIZER.value)
    if _MEMORY.value:
        worker_memory(data, _MEMORY.value)
        return
    times = compare(data, _ROUNDS.value)
    for name, value in times.items():
        print(
            f"{name:26} {value:7.2f} ms per record and core, {times['PyTorch DataLoader'] / value:6.1f} times PyTorch's rate"
        )
    run = times["disk cache, first epoch"] + 2 * times["disk cache, later epochs"]
    print(f"a run of 3 epochs with a disk cache: {3 * times['PyTorch DataLoader'] / run:.1f} times PyTorch's rate")
    print(
        f"later epochs over the first without a cache: {times['no cache'] / times['disk cache, later epochs']:.1f} times"
    )


if __name__ == "__main__":
    app.run(main)
