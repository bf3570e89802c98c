"""The tokenizer that belongs to a checkpoint, and rows for tokens that its embedding does not have yet."""

import hashlib
import pathlib
import shutil

import numpy as np

from medplib_jax import checkpoint
from medplib_jax.data.tokenizers import ADDED_FILE, ADDED_TOKENS, MODEL_FILE, Tokenizer

GROWING = ("llm/embed/embedding", "llm/head/kernel")  # parameters with a vocabulary axis


def find_tokenizer(given: pathlib.Path | None, folders: list[pathlib.Path]) -> pathlib.Path:
    """The folder of the tokenizer: `given`, else the first of `folders` that has one.

    Raises FileNotFoundError without any, ValueError when `given` is another tokenizer than the one that lies beside the
    weights."""
    beside = [folder for folder in folders if (folder / MODEL_FILE).is_file()]
    if given is None:
        if not beside:
            raise FileNotFoundError(
                f"no {MODEL_FILE} beside the weights ({', '.join(map(str, folders))}); give its folder with --tokenizer"
            )
        return beside[0]
    if not (given / MODEL_FILE).is_file():
        raise FileNotFoundError(f"{given}: expected {MODEL_FILE}")
    for folder in beside:
        if _digest(folder) != _digest(given):
            raise ValueError(
                f"{given / MODEL_FILE} is another tokenizer than {folder / MODEL_FILE}, which belongs to the weights"
            )
    return given


def copy_tokenizer(source: pathlib.Path, folder: pathlib.Path) -> None:
    """Copies a tokenizer's files into `folder`, with the list of added tokens that LLaVA's and LLaMA's lack."""
    folder.mkdir(exist_ok=True)
    for path in checkpoint.tokenizer_files(str(source)):
        shutil.copyfile(path, folder / path.name)
    if not (folder / ADDED_FILE).exists():
        Tokenizer.load(str(folder)).save(str(folder))


def missing_rows(folder: pathlib.Path, rows: int) -> int:
    """How many of the added tokens an embedding of `rows` rows lacks: none or all. ValueError when the tokenizer does
    not fit."""
    size = Tokenizer.load(str(folder)).vocab_size
    base = size - len(ADDED_TOKENS)
    if rows not in (base, size):
        raise ValueError(
            f"{folder}: wrong tokenizer: it has {base} pieces and {len(ADDED_TOKENS)} added tokens, "
            f"so the embedding should have {base} or {size} rows, but the weights have {rows}"
        )
    return size - rows


def grow(path: str, array: np.ndarray, count: int) -> np.ndarray:
    """`array` with `count` more entries on its vocabulary axis, each the mean of the existing ones.

    The original draws them from a normal distribution (transformers' `resize_token_embeddings`) and trains them. The
    mean is LLaVA's rule for its own added tokens: it needs no seed and starts every new token at the average score."""
    axis = 0 if path == GROWING[0] else 1
    mean = array.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
    return np.concatenate([array, np.repeat(mean, count, axis=axis)], axis=axis)


def _digest(folder: pathlib.Path) -> str:
    return hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
