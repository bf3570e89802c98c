"""PyTorch checkpoint files as named tensors, read and written one at a time: safetensors natively, `.bin`/`.pth`
through torch. Paddle's (`paddle_files`) are read, too.

Nothing is unpickled but tensors (`weights_only=True`). numpy arrays come out, bfloat16 as `ml_dtypes.bfloat16`.
"""

import dataclasses
import functools
import json
import math
import os
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator

import jax
import ml_dtypes
import numpy as np
import safetensors
from tqdm import tqdm

from medplib_jax.parallel.ahead import ahead

from . import paddle_files

Shape = tuple[int, ...]

FLOATS = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_INTEGERS = {"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_}
_TYPES = FLOATS | {name: np.dtype(kind) for name, kind in _INTEGERS.items()}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", paddle_files.SUFFIX)
_NOT_WEIGHTS = re.compile(
    r"^(training_args|optimizer|scheduler|rng_state|random_states|mp_rank_|zero_pp_|bf16_zero_pp_)"
)
_ZERO = re.compile(r"^(global_step\d+$|zero_to_fp32\.py$|mp_rank_|zero_pp_|bf16_zero_pp_)")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.")
_BLOCK = 1 << 17
_BITS = {4: (np.uint32, 0x7FFFFFFF, 0x7F800000), 2: (np.uint16, 0x7FFF, None)}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet."""

    file: pathlib.Path
    shape: Shape
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def read_folder(source: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor of one file, or of all weight files of a folder.

    Where a folder holds the same model in two formats, safetensors are read. An index file may be absent, of the other
    format, or wrong in where it puts tensors; what is read is what the files hold. A tensor that is in two files is one
    if both have the same values. Raises FileNotFoundError without weights or when a shard is missing, ValueError on a
    damaged file or a name with two values.
    """
    files = [source] if source.is_file() else _weight_files(source)
    tensors: dict[str, Tensor] = {}
    for file in files:
        for name, tensor in read_file(file).items():
            if name in tensors and not equal(tensors[name], tensor):
                raise ValueError(f"{file}: tensor {name!r} is also in {tensors[name].file.name}, with other values")
            tensors.setdefault(name, tensor)
    if source.is_dir():
        _check_shards(source, files, tensors)
    return tensors


def equal(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever types."""
    return one.shape == other.shape and np.array_equal(one.read().astype(np.float64), other.read().astype(np.float64))


def read_file(file: pathlib.Path) -> dict[str, Tensor]:
    """Name -> tensor of one file. ValueError when it is truncated, not a checkpoint, or a pickle with more than
    tensors."""
    if file.suffix == paddle_files.SUFFIX:
        return _read_paddle(file)
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in _SUFFIXES and not _NOT_WEIGHTS.match(p.name))
    stems = {_stem(p) for p in found if p.suffix == ".safetensors"}
    found = [p for p in found if p.suffix == ".safetensors" or _stem(p) not in stems]
    if found:
        return found
    names = sorted(p.name for p in folder.iterdir())
    if any(_ZERO.match(name) for name in names):
        raise FileNotFoundError(
            f"{folder}: a checkpoint of DeepSpeed ZeRO in parts; first put it together, in that folder: "
            "`python zero_to_fp32.py . pytorch_model.bin`, then give pytorch_model.bin as --source and the folder of "
            "its config.json as --config"
        )
    raise FileNotFoundError(f"{folder}: expected weights (*.safetensors, *.bin, *.pth or *.pt), found {names[:10]}")


def _stem(file: pathlib.Path) -> str:
    """What a file holds, whatever its format: `pytorch_model-00001-of-00002.bin` and `model.safetensors` both
    "model"."""
    return _SHARD.sub(".", file.name).removesuffix(file.suffix).removeprefix("pytorch_")


def _check_shards(folder: pathlib.Path, files: list[pathlib.Path], tensors: dict[str, Tensor]) -> None:
    present = {file.name for file in files}
    for file in files:
        numbered = _SHARD.search(file.name)
        for i in range(1, int(numbered[2]) + 1) if numbered else ():
            name = _SHARD.sub(f"-{i:05d}-of-{numbered[2]}.", file.name)
            if name not in present:
                raise FileNotFoundError(f"{folder}: shard {name} is missing; found {sorted(present)}")
    for index in sorted(folder.glob("*.index.json")):
        shards = json.loads(index.read_text())["weight_map"]
        for name, shard in shards.items():
            if name not in tensors and not (folder / shard).exists():
                raise FileNotFoundError(
                    f"{index}: tensor {name!r} is in no file, and the shard {shard} that should hold it is missing"
                )


def _read_safetensors(file: pathlib.Path) -> dict[str, Tensor]:
    try:
        opened = safetensors.safe_open(file, "np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file}: truncated, damaged or not a safetensors file: {error}") from error
    tensors = {}
    for name in opened.keys():
        header = opened.get_slice(name)
        if header.get_dtype() not in _TYPES:
            raise ValueError(f"{file}: tensor {name!r} has type {header.get_dtype()}; known are {sorted(_TYPES)}")
        read = functools.partial(_read_tensor, file, name)
        tensors[name] = Tensor(file, tuple(header.get_shape()), _TYPES[header.get_dtype()], read)
    return tensors


def _read_tensor(file: pathlib.Path, name: str) -> np.ndarray:
    """Opens the file anew: one that stays open keeps all pages that were ever read in the process's memory."""
    with safetensors.safe_open(file, "np") as opened:
        return opened.get_tensor(name)


def _read_pickle(file: pathlib.Path) -> dict[str, Tensor]:
    torch = _torch(file)
    try:
        # mmap: only the tensors that are read come into memory; the format before PyTorch 1.6 does not have it
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file}: refused, the pickle holds more than tensors (it could run code when loaded): {str(error)[:200]}"
        ) from error
    except (RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{file}: truncated or damaged: {' '.join(str(error).split())[:200]}") from error
    for key in ("model", "module", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict):
        raise ValueError(f"{file}: expected a dictionary of tensors, found {type(loaded).__name__}")
    tensors = {}
    for name, value in loaded.items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(f"{file}: {name!r}: expected a tensor, found {type(value).__name__}")
        dtype = (
            np.dtype(ml_dtypes.bfloat16)
            if value.dtype == torch.bfloat16
            else np.dtype(str(value.dtype).removeprefix("torch."))
        )
        tensors[name] = Tensor(file, tuple(value.shape), dtype, _torch_reader(torch, value))
    return tensors


def _read_paddle(file: pathlib.Path) -> dict[str, Tensor]:
    arrays = paddle_files.read_arrays(file)
    return {name: Tensor(file, x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in arrays.items()}


def _torch_reader(torch, value) -> Callable[[], np.ndarray]:
    if value.dtype == torch.bfloat16:
        return lambda: value.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return lambda: value.contiguous().numpy()


def _torch(file: pathlib.Path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{file.name}: .bin and .pth files need torch (pip install torch); safetensors files do not"
        ) from error
    return torch


def cast(name: str, file: pathlib.Path, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The tensor in another type, finite. ValueError when it holds NaN or infinity, or overflows."""
    with np.errstate(over="ignore"):
        made = tensor.astype(dtype, copy=False)
    try:
        check_finite(name, file, made)
    except ValueError:
        check_finite(name, file, tensor)
        largest, most = np.abs(tensor.astype(np.float64)).max(), float(ml_dtypes.finfo(dtype).max)
        raise ValueError(
            f"{file}: tensor {name!r} overflows {dtype}: it reaches {largest:.4g}, {dtype} ends at {most:.4g}; "
            "choose bf16 or fp32 with --dtype"
        ) from None
    return made


def check_finite(name: str, file: pathlib.Path, tensor: np.ndarray) -> None:
    """ValueError when a tensor holds NaN or infinity. Works on the bits: numpy has no fast isfinite for bfloat16."""
    if tensor.dtype.itemsize not in _BITS:
        finite = np.isfinite(tensor).all()
        if not finite:
            raise ValueError(f"{file}: tensor {name!r} holds NaN or infinite values")
        return
    kind, mask, infinity = _BITS[tensor.dtype.itemsize]
    if infinity is None:
        infinity = 0x7C00 if tensor.dtype == np.float16 else 0x7F80
    bits = tensor.view(kind).reshape(-1)
    blocks = (bits[i : i + _BLOCK] for i in range(0, bits.size, _BLOCK))  # of a size that stays in the cache
    if any(int((block & kind(mask)).max()) >= infinity for block in blocks):
        raise ValueError(f"{file}: tensor {name!r} holds NaN or infinite values")


def contiguous(view: np.ndarray) -> np.ndarray:
    """The view's elements in C order. XLA's transpose on the CPU is five times as fast as numpy's."""
    return view if view.flags.c_contiguous else np.asarray(jax.device_put(view, jax.local_devices(backend="cpu")[0]))


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written."""

    name: str
    shape: Shape
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: pathlib.Path, tensors: Iterable[Planned], file_format: str, shard_bytes: int, stem: str = ""
) -> None:
    """Writes `model*.safetensors` or `pytorch_model*.bin` with an index when there are several, each of at most
    `shard_bytes` (or one tensor)."""
    shards = list(_pack(tensors, shard_bytes))
    usual, suffix, write = _FORMATS[file_format]
    stem = stem or usual
    weight_map, total = {}, sum(tensor.nbytes for shard in shards for tensor in shard)
    with progress("PyTorch", total) as bar:
        for i, shard in enumerate(shards):
            name = f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}" if len(shards) > 1 else stem + suffix
            write(folder / name, shard, bar)
            weight_map |= {tensor.name: name for tensor in shard}
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index, indent=2))


def progress(what: str, total: int) -> tqdm:
    """A bar of the bytes written."""
    return tqdm(total=total, desc=f"writing {what}", unit="B", unit_scale=True)


def _pack(tensors: Iterable[Planned], shard_bytes: int) -> Iterator[list[Planned]]:
    shard, size = [], 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    if shard:
        yield shard


def _write_safetensors(file: pathlib.Path, tensors: list[Planned], bar: tqdm) -> None:
    header, offset = {"__metadata__": {"format": "pt"}}, 0  # transformers refuses a file without this
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (offset, offset + tensor.nbytes),
        }
        offset += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
    start = 8 + len(text)
    places = [start + header[tensor.name]["data_offsets"][0] for tensor in tensors]
    puts = (functools.partial(_put, file, place, tensor) for place, tensor in zip(places, tensors, strict=True))
    for nbytes in ahead(puts, [tensor.nbytes for tensor in tensors]):
        bar.update(nbytes)


def _put(file: pathlib.Path, place: int, tensor: Planned) -> int:
    """Makes a tensor and writes it into its place of a file; several threads do so at once."""
    with open(file, "r+b") as stream:
        stream.seek(place)
        stream.write(_made(tensor).view(np.uint8).data)
        stream.flush()
        if hasattr(os, "posix_fadvise"):  # begins to write to the disk, and waits for nothing; macOS does not have it
            os.posix_fadvise(stream.fileno(), place, tensor.nbytes, os.POSIX_FADV_DONTNEED)
    return tensor.nbytes


def _made(tensor: Planned) -> np.ndarray:
    return contiguous(tensor.make())


def _write_pickle(file: pathlib.Path, tensors: list[Planned], bar: tqdm) -> None:
    torch = _torch(file)

    def as_torch(array: np.ndarray):
        bits = np.require(array, requirements="W")
        return (
            torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
            if array.dtype == ml_dtypes.bfloat16
            else torch.from_numpy(bits)
        )

    made = {}
    for tensor, values in zip(tensors, ahead(functools.partial(_made, tensor) for tensor in tensors), strict=True):
        made[tensor.name] = as_torch(values)
        bar.update(tensor.nbytes)
    torch.save(made, file)


_FORMATS = {
    "safetensors": ("model", ".safetensors", _write_safetensors),
    "bin": ("pytorch_model", ".bin", _write_pickle),
}
